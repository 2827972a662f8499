"""Time on a device: CUDA graphs replayed between events, and the two ceilings that everything is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from bench.points import Ceilings

GRAPH_S = 2e-3
"""A graph holds as many calls as this takes: the events' half microsecond is then nothing."""
REPLAYS = 21

Call = Callable[[int], None]
"""A computation on set number i of some operands."""
Timer = Callable[[Call, int], dict[str, float]]
"""(call, number of sets) -> seconds of one call: median, and the 20% and 80% quantiles as low and high."""


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "low": low, "high": high}


def graph_seconds(call: Call, sets: int) -> dict[str, float]:
    """Seconds of one call among calls over all sets in turn, as many rounds of them as a graph takes."""
    _replay(_capture(call, sets, 1), 1)
    once = min(_replay(_capture(call, sets, 1), 3))
    rounds = max(1, min(64, int(GRAPH_S / once)))
    return quantiles([seconds / (rounds * sets) for seconds in _replay(_capture(call, sets, rounds), REPLAYS)])


def _capture(call: Call, sets: int, rounds: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)  # compiles, and lets libraries take their workspaces
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for number in range(sets):
                call(number)
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def ceilings(device: torch.device, timer: Timer, copy_bytes: int = 2 << 30, size: int = 8192) -> Ceilings:
    """What a large copy and a large bf16 product of random numbers reach here."""
    source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)

    def copy(_: int) -> None:
        target.copy_(source)

    def multiply(_: int) -> None:
        torch.mm(left, right, out=out)

    return Ceilings(2 * copy_bytes / timer(copy, 1)["median"], 2 * size**3 / timer(multiply, 1)["median"])
