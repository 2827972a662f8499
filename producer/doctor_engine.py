"""The doctor's look at what computes: device, Triton, the multi-LoRA operator, the base and its adapters."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramill.producer.doctor import Finding, State, version_of

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_BOUND = 1e-5
"""Of the operator's relative error in float32."""
_WIDTHS, _K, _RANK, _SLOTS, _ROWS = (32, 16), 64, 8, 3, 12


def device(asked: str) -> Iterator[Finding]:
    """What computes."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            said = f"cuda:{number} {about.name}, {free / _GIB:,.1f} of {total / _GIB:,.1f} GiB free"
            yield Finding("device", State.OK, f"{said}, compute capability {about.major}.{about.minor}")
    elif asked == "cuda":
        advice = "install a CUDA build of torch and a driver, or give --device cpu"
        yield Finding("device", State.FAIL, f"--device cuda: torch {torch.__version__} sees none", advice)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    from loramill.worker.memory import free_memory

    instructions = torch.backends.cpu.get_cpu_capability()
    memory = f"{free_memory('cpu') / _GIB:,.1f} GiB free"
    yield Finding("device", State.OK, f"cpu {platform.machine()}, {cores} cores, {instructions}, {memory}")


def triton() -> Iterator[Finding]:
    """Whether kernels are compiled, interpreted, or not used."""
    import torch

    version = version_of("triton")
    if torch.cuda.is_available() and version is None:
        yield Finding("triton", State.FAIL, "not installed, and there is a CUDA device", "install triton")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        said = "TRITON_INTERPRET=1: kernels are interpreted, thousands of times slower"
        yield Finding("triton", State.WARN, said, "unset it unless you test kernels")
    elif torch.cuda.is_available():
        yield Finding("triton", State.OK, f"triton {version} compiles for the device")
    else:
        yield Finding("triton", State.OK, f"triton {version or 'is not installed and'} is not used on a CPU")


def native() -> Iterator[Finding]:
    """Whether the operators for a CPU are compiled."""
    from loramill.kernels.native import matrix_unit, operators

    if operators() is not None:
        by_unit = "; those in bfloat16 use its matrix unit (AMX)" if matrix_unit() else ""
        yield Finding("native", State.OK, f"the operators for a CPU are compiled{by_unit}")
    elif os.environ.get("LORAMILL_NATIVE") == "0":
        yield Finding("native", State.WARN, "LORAMILL_NATIVE=0: a CPU computes at about 60 % of its speed", "unset it")
    else:
        said = "the operators for a CPU are not compiled: it computes at about 60 % of its speed"
        yield Finding("native", State.WARN, said, "install g++ (the package of that name, or build-essential)")


def kernel(asked: str) -> Iterator[Finding]:
    """The multi-LoRA operator against its formula, on the device that would be used and on a tiny input."""
    import torch

    name = "cuda" if torch.cuda.is_available() and asked != "cpu" else "cpu"
    error = operator_error(torch.device(name))
    said = f"multi-LoRA on {name}: relative error {error:.1e} against the formula in float64"
    if error <= _BOUND:
        yield Finding("kernel", State.OK, said)
    else:
        yield Finding("kernel", State.FAIL, said, f"it must be below {_BOUND:g}: answers of adapters would be wrong")


def operator_error(where: torch.device) -> float:
    """Relative, in float32, of the adapter slots that the engine would use there."""
    import torch

    from loramill.kernels.mixes import Mix, only
    from loramill.kernels.multi_lora import multi_lora_reference
    from loramill.kernels.router import Router
    from loramill.kernels.segments import segments_of
    from loramill.worker.lora import slots_over
    from loramill.worker.packed import Delta

    source = torch.Generator().manual_seed(1)
    a = torch.randn(_SLOTS, len(_WIDTHS), _RANK, _K, generator=source)
    b = torch.randn(_SLOTS, _RANK, sum(_WIDTHS), generator=source)
    x = torch.randn(_ROWS, _K, generator=source)
    y = torch.randn(_ROWS, sum(_WIDTHS), generator=source)
    runs: list[tuple[Mix, int]] = [(only(0), 5), ((), 2), (only(1), 1), (((0, 0.5), (2, 2.0)), 4)]
    expected = y.double()
    multi_lora_reference(expected, x, a, b, _WIDTHS, segments_of(runs))
    lora = slots_over(_SLOTS, _WIDTHS, _K, torch.float32, where)
    for slot in range(_SLOTS):
        lora.put(
            slot, [Delta(*pair) for pair in zip(a[slot].to(where), b[slot].to(where).split(_WIDTHS, 1), strict=True)]
        )
    y = y.to(where)
    lora.add(y, x.to(where), Router(_SLOTS, where).route(runs))
    return float((y.cpu().double() - expected).norm() / expected.norm())


def models(base_model: str | None, chat_template: Path | None, **given: Any) -> Iterator[Finding]:
    """The base and the adapters, opened and checked without weights."""
    if base_model is None:
        yield Finding("models", State.OK, "none are given; with --base-model and --adapter they are looked at too")
        return
    from loramill.worker.base_files import silence_libraries
    from loramill.worker.models import open_models
    from loramill.worker.settings import ModelOptions

    silence_libraries()
    options = ModelOptions(base_model=base_model, chat_template=chat_template, **given)
    opened = open_models(options, all_or_nothing=False)
    said = f"{opened.names.base} at {opened.base.path}: context {opened.base.max_model_len:,}"
    yield Finding("base", State.OK, said)
    for name, adapter in opened.adapters.items():
        alone = f", served merged only: {'; '.join(adapter.static_only)}" if adapter.static_only else ""
        yield Finding("adapter", State.OK, f"{name}: rank {adapter.rank}, {adapter.sha256[:12]}{alone}")
    for name, problems in opened.unusable.items():
        yield Finding("adapter", State.FAIL, f"{name}: {'; '.join(problems)}", "its rows are refused")
    for warning in opened.warnings:
        yield Finding("models", State.WARN, warning)
