"""What the Triton kernels share: their two forms, the dtypes, and how a launch is described so that it can be compiled
ahead of time.

Each kernel has two forms. The aligned one is told that its pointers and strides divide by 16, so its loads are wide; it
runs only where that is true. The plain one is told nothing. So one block size gives two programs, whatever the shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramill.kernels.blocks import Blocks

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ALIGNMENT = 16
TABLES = {
    **dict.fromkeys(("ranks", "order", "tile_mix", "tile_start", "tile_rows"), "i32"),
    **dict.fromkeys(("mix_of_row", "mix_slots", "mix_members"), "i32"),
    "mix_weights": "fp32",
    **dict.fromkeys(("starts", "lengths", "tables"), "i32"),
    "lines": "i64",
    **dict.fromkeys(("partial", "softmax", "cos", "sin"), "fp32"),
}
"""What the pointers to tables and to scratch point to, by their names in every kernel."""
NUMBERS = dict.fromkeys(("scale", "softcap", "eps"), "fp32")
"""The arguments that are no int32, by their names in every kernel."""


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(left, right, total):  # type: ignore[no-untyped-def]
    """total + left @ right, in float32 and, for float32 factors, as exact as float32 is."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 numbers; in float32 each product is exact
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def rounded(value, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to `dtype`, to the nearest and ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts bfloat16 off; devices round it
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)


@dataclass(slots=True, frozen=True)
class Kernel:
    """A kernel and its arguments: tensors and strides that the aligned form is told about, and the rest."""

    function: Any
    aligned: Any
    plain: Any
    names: tuple[str, ...]
    wide: tuple[str, ...]
    reduced: str
    """What the constant for `Blocks.k` is called."""

    def launch(self, grid: tuple[int, ...], arguments: Mapping[str, Any], blocks: Blocks, **constants: int) -> None:
        """Run over `grid` with those of `arguments` that the kernel takes; an empty grid is no launch.

        Raises:
            ValueError: more programs in the second or third dimension than a device can count.
        """
        if 0 in grid:
            return
        if any(size > 65535 for size in grid[1:]):
            raise ValueError(f"a grid of {grid} programs is too large; use fewer splits or members")
        form = self.aligned if self.is_aligned(arguments) else self.plain
        taken = {name: value for name, value in arguments.items() if name in self.names}
        constants |= self.block_constants(blocks)
        form[grid](**taken, **constants, num_warps=blocks.warps, num_stages=stages_on_device(blocks))

    def choose(self, arguments: Mapping[str, Any], wanted: Blocks, listed: Sequence[Blocks], plain: Blocks) -> Blocks:
        """The blocks wanted where the aligned form runs (else the first listed), or the plain ones."""
        if not self.is_aligned(arguments):
            return plain
        return wanted if wanted in listed else listed[0]

    def block_constants(self, blocks: Blocks) -> dict[str, int]:
        return {"BLOCK_N": blocks.n, self.reduced: blocks.k}

    def is_aligned(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the aligned form may run."""
        values = [arguments[name] for name in self.wide]
        return all((v.data_ptr() if isinstance(v, Tensor) else v) % ALIGNMENT == 0 for v in values)


@dataclass(slots=True, frozen=True)
class Variant:
    """One program that can be launched, as the compiler wants it: argument types, constants, options."""

    kernel: Kernel
    aligned: bool
    signature: Mapping[str, str]
    constants: Mapping[str, int]
    warps: int
    stages: int


def kernel(function: Any, wide: Iterable[str], reduced: str) -> Kernel:
    """Both forms of a kernel function; `wide` names the arguments whose alignment the aligned one may use."""
    wide = tuple(wide)
    names = list(function.__code__.co_varnames[: function.__code__.co_argcount])
    narrow = [name for name in names if name not in wide and not name.isupper()]
    return Kernel(
        function,
        triton.jit(function, do_not_specialize=narrow),
        triton.jit(function, do_not_specialize=[*narrow, *wide]),
        tuple(names),
        wide,
        reduced,
    )


def variants(
    of: Kernel, pointers: Mapping[str, str], listed: Sequence[Blocks], plain: Blocks, hip: bool, **constants: int
) -> Iterator[Variant]:
    """The programs of a kernel with these blocks: the aligned form with each that is listed, and the plain one."""
    for blocks in (*listed, plain):
        yield variant(of, blocks is not plain, pointers, blocks, hip, **constants)


def variant(
    of: Kernel, aligned: bool, pointers: Mapping[str, str], blocks: Blocks, hip: bool, **constants: int
) -> Variant:
    """One program of a kernel: `pointers` to what it is given; numbers are int32 but for NUMBERS."""
    known = constants | of.block_constants(blocks)
    types = dict.fromkeys(of.names, "i32")
    types |= {name: dtype for name, dtype in NUMBERS.items() if name in types}
    types |= {name: f"*{dtype}" for name, dtype in {**TABLES, **pointers}.items() if name in types}
    types |= dict.fromkeys(known, "constexpr")
    return Variant(of, aligned, types, known, blocks.warps, stages_on(blocks, hip))


def stages_on(blocks: Blocks, hip: bool) -> int:
    """Loads in flight: AMD's 64 KiB of shared memory holds two stages of what others hold four of."""
    return min(blocks.stages, 2) if hip else blocks.stages


def stages_on_device(blocks: Blocks) -> int:
    return stages_on(blocks, torch.version.hip is not None)
