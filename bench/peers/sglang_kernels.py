"""SGLang's chunked Triton kernels (csgmv) from a checkout, on the operands of a point.

As its backend calls them: rows sorted by adapter and cut into chunks, a bridge in the weights' dtype, expand adds to y.
The height of a chunk is the server's to set: `chunk` is its `--max-lora-chunk-size`, 16 by default.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.clock import Call
from bench.operands import Operands
from bench.peers.checkout import chosen, load
from bench.peers.kernel_forms import AbsentError

SHRINK, EXPAND = "chunked_sgmv_shrink", "chunked_sgmv_expand"


class Sglang:
    """Shrink and expand of SGLang, cut into chunks of at most `chunk` rows."""

    def __init__(self, functions: tuple[Callable[..., Any], Callable[..., Any]], chunk: int) -> None:
        self._shrink, self._expand = functions
        self._largest = chunk
        self.name = f"sglang-{chunk}"
        self.title = f"SGLang's kernels, chunks of {chunk}" if chunk == 16 else f"SGLang's kernels, chunks to {chunk}"

    def prepare(self, operands: Operands) -> Call:
        point, device = operands.point, operands.x.device
        columns = operands.columns()
        chunk = chunk_rows(point.rows, self._largest)
        cuts = [(slot, at) for slot, first, last in operands.segments() for at in range(first, last, chunk)]
        batch = SimpleNamespace(
            use_cuda_graph=False,
            bs=len(cuts),
            num_segments=len(cuts),
            max_len=chunk,
            seg_lens=None,
            seg_indptr=torch.tensor([*(at for _, at in cuts), point.rows], dtype=torch.int32, device=device),
            weight_indices=torch.tensor([slot for slot, _ in cuts], dtype=torch.int32, device=device),
            lora_ranks=torch.full((point.adapters,), point.rank, dtype=torch.int32, device=device),
            scalings=torch.ones(point.adapters, device=device),
            permutation=torch.arange(point.rows, dtype=torch.int32, device=device),
        )
        a = operands.a.flatten(2, 3)  # [sets, S, siblings * R, K]
        b = operands.b.transpose(2, 3).contiguous()  # [sets, S, N, R]
        offsets = torch.tensor([0, *(c.stop for c in columns)], dtype=torch.int32, device=device)
        given = {"batch_info": batch, "num_slices": len(columns), "slice_offsets": offsets}
        given |= {"max_slice_size": max(point.projection.widths), "base_output": None, "x": None, "weights": None}
        given |= {"slice_offsets_cpu": offsets.cpu()}
        shrink, expand = chosen(self._shrink, given), chosen(self._expand, given)

        def call(number: int) -> None:
            v = self._shrink(**shrink | {"x": operands.x[number], "weights": a[number]})
            self._expand(**expand | {"x": v, "weights": b[number], "base_output": operands.y[number]})

        return call


def chunk_rows(rows: int, largest: int) -> int:
    """The height that SGLang's backend takes for a batch of `rows`."""
    return min(largest, 128 if rows >= 256 else 32 if rows >= 64 else 16)


def sglang_forms(root: Path) -> list[Sglang]:
    """The default of its server, and the largest chunks it has. Raises `AbsentError` when they cannot be loaded."""
    base = root / "python" if (root / "python").is_dir() else root
    # They have moved twice; their configurations of measured block sizes lie beside them.
    found = sorted((base / "sglang").rglob(f"{SHRINK}.py"))
    if not found:
        raise AbsentError(f"there is no {SHRINK}.py in {base / 'sglang'}")
    folder = found[0].parent
    package = ".".join(folder.relative_to(base).parts)
    beside = ["lora_tuning_config"] if (folder / "lora_tuning_config.py").is_file() else []
    files = {f"{package}.{name}": folder / f"{name}.py" for name in (*beside, SHRINK, EXPAND)}
    *_, shrink, expand = load("sglang", files, _stand_ins())
    functions = shrink.chunked_sgmv_lora_shrink_forward, expand.chunked_sgmv_lora_expand_forward
    return [Sglang(functions, chunk) for chunk in (16, 128)]


class _Switches:
    """SGLang's environment switches, all at their default."""

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(get=lambda: False)


def _stand_ins() -> dict[str, dict[str, object]]:
    def cached(_: object) -> Callable[[object], object]:
        return lambda kernel: kernel

    return {
        "sglang.srt.lora.utils": {"LoRABatchInfo": SimpleNamespace},
        "sglang.srt.utils": {
            "cached_triton_kernel": cached,
            "get_device_name": lambda *_: torch.cuda.get_device_name(),
        },
        "sglang.srt.environ": {"envs": _Switches()},
    }
