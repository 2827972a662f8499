"""Compile kernels ahead of time and print, a JSON line each, what they take; a process of its own, away from the
interpreter that the other tests run in. Arguments: which part of how many parts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramill.kernels.attention_triton import attention_variants
from loramill.kernels.expand import expand_variants
from loramill.kernels.jit import ALIGNMENT, Variant
from loramill.kernels.layer_triton import layer_variants
from loramill.kernels.rows import row_variants
from loramill.kernels.shrink import shrink_variants

LISTS = (shrink_variants, expand_variants, row_variants, attention_variants, layer_variants)

TARGETS = (
    GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64),
)  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(variant: Variant, target: Any) -> Any:
    form = variant.kernel.aligned if variant.aligned else variant.kernel.plain
    wide = variant.kernel.wide if variant.aligned else ()
    attributes = {(form.arg_names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in wide}
    source = ASTSource(form, dict(variant.signature), dict(variant.constants), attributes)
    return triton.compile(
        source,
        target=target,
        options={"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True},
    )


def spills(program: Any, target: Any) -> int | None:
    """What a thread keeps in memory for want of registers: bytes (CUDA) or registers (AMD); None without the tools."""
    if target.backend == "hip":
        return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", program.asm["amdgcn"])))
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(program.asm["cubin"])
        said = output_of(TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
        if said is None or re.search(r"STACK:0 .*LOCAL:0 ", said):
            return None if said is None else 0
        # A stack may hold more than spilled registers: ask the assembler.
        ptx.write_text(program.asm["ptx"])
        architecture = re.search(r"\.target (\w+)", program.asm["ptx"])
        assert architecture
        ptxas = TOOLS / ("ptxas-blackwell" if target.arch >= 100 else "ptxas")
        said = output_of(ptxas, "-v", f"--gpu-name={architecture[1]}", ptx, "-o", Path(folder, "again.cubin"))
        return None if said is None else sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def output_of(tool: Path, *arguments: str | Path) -> str | None:
    """What a tool says on either stream; None where it is not there."""
    if not tool.exists():
        return None
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main(part: int, parts: int) -> None:
    jobs = [
        (target, variant) for target in TARGETS for variants in LISTS for variant in variants(target.backend == "hip")
    ]
    for target, variant in jobs[part::parts]:
        program = compiled(variant, target)
        line = {
            "kernel": variant.kernel.function.__name__,
            "types": [kind for kind in variant.signature.values() if kind.startswith("*")][:3],
            "constants": dict(variant.constants),
            "aligned": variant.aligned,
            "warps": variant.warps,
            "target": f"{target.backend} {target.arch}",
            "shared": program.metadata.shared,
            "spills": spills(program, target),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
