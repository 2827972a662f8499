"""Measure every launch that a shape could get on this device, and write the best ones down as its plan.

    python -m loramill.kernels.tune [--out plan.json] [K:WIDTH,WIDTH... ...]

A shape is what projections read and how wide they are, such as 4096:4096,1024,1024 for Llama-3-8B's q, k and v. Rows
are spread evenly over the adapters. A launch whose result is not the default's is an error, and no plan is written.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loramill.kernels.blocks import HEIGHTS
from loramill.kernels.plan import Entry, Launch, Regime, Shape, default_launch, default_path, save_plan, tile_height
from loramill.kernels.routing import Mixes, route_host

LLAMA_3_8B = ("4096:4096,1024,1024", "4096:4096", "4096:14336,14336", "14336:4096")
ROWS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
RANKS = (8, 16, 32, 64, 128)
SLOTS = 32
SPLITS = (1, 2, 4, 8, 16)
AGREEMENT = 1e-2
"""||y - y of the default|| / ||delta||: bfloat16 rounds the outputs, 2^-9 each."""


def candidates(shape: Shape) -> Iterator[Launch]:
    """Every launch worth a measurement: more splits than blocks of K are not."""
    expands = range(len(shape.expand_blocks))
    for shrink, expand, splits in itertools.product(range(len(shape.shrink_blocks)), expands, SPLITS):
        if splits == 1 or splits * shape.shrink_blocks[shrink].k <= shape.k:
            yield Launch(Regime.GROUPED, splits, shrink, expand)
    for expand in expands:
        yield Launch(Regime.ALL_SLOTS, 1, 0, expand)
    if shape.height == HEIGHTS[0]:
        yield from (Launch(Regime.ROWS, splits, 0, 0) for splits in SPLITS)


def parse_shape(text: str) -> tuple[int, list[int]]:
    """K and the widths of `K:WIDTH,WIDTH...`.

    Raises:
        ValueError: it is not that.
    """
    k, _, widths = text.partition(":")
    found = int(k), [int(width) for width in widths.split(",")]
    if found[0] < 1 or min(found[1]) < 1 or len(found[1]) > 4:
        raise ValueError(f"a shape is K:WIDTH,WIDTH... of positive numbers and at most 4 widths, not {text}")
    return found


def best_launch(k: int, widths: Sequence[int], rows: int, rank: int, device: torch.device) -> Entry:
    """Measure one shape in bfloat16.

    Raises:
        RuntimeError: a launch gave another result than the default.
    """
    from triton.testing import do_bench_cudagraph

    from loramill.kernels.on_device import carry_out, shape_of

    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).bfloat16()

    height = tile_height(rows, min(rows, SLOTS))
    mixes = Mixes.of([((slot, 1.0),) for slot in range(SLOTS)], SLOTS, device)
    routing = route_host(sorted(row % SLOTS for row in range(rows)), mixes, height)
    x, y = normal(rows, k), torch.zeros(rows, sum(widths), dtype=torch.bfloat16, device=device)
    a, b = normal(SLOTS, len(widths), rank, k) / k**0.5, normal(SLOTS, rank, sum(widths)) / rank**0.5
    ranks = torch.full((SLOTS, len(widths)), rank, dtype=torch.int32, device=device)
    shape = shape_of(x, rank, sum(widths), routing)

    def run(launch: Launch, into: Tensor) -> None:
        carry_out(launch, into, x, a, b, widths, ranks, routing)

    expected = torch.zeros_like(y)
    run(default_launch(shape, routing.tiles, len(widths) * rank), expected)
    times: dict[Launch, float] = {}
    for launch in candidates(shape):
        run(launch, y.zero_())
        error = float((y.float() - expected.float()).norm() / expected.float().norm())
        if not error < AGREEMENT:
            raise RuntimeError(f"{launch} is wrong for {shape}: it differs from the default by {error:.1e}")
        times[launch] = do_bench_cudagraph(lambda launch=launch: run(launch, y), rep=10)
    best = min(times, key=times.__getitem__)
    print(f"{shape}: {times[best] * 1e3:.1f} us with {best}", file=sys.stderr, flush=True)
    return Entry(shape, best)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loramill.kernels.tune", description="Measure this device's plan.")
    parser.add_argument("shapes", nargs="*", default=LLAMA_3_8B, metavar="K:WIDTH,WIDTH...")
    parser.add_argument("--out", type=Path, help="where to write the plan (default: where it is looked for)")
    given = parser.parse_args()
    try:
        shapes = [parse_shape(text) for text in given.shapes]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("tune: no CUDA device is here to be measured", file=sys.stderr)
        return 1
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    entries = [
        best_launch(k, widths, rows, rank, device) for (k, widths), rank, rows in itertools.product(shapes, RANKS, ROWS)
    ]
    path = given.out or default_path(name, triton.__version__)
    save_plan(path, name, triton.__version__, entries)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
