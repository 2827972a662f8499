"""`python -m bench.kernels`: the multi-LoRA operator on this GPU beside its peers, as JSON.

Every form gets the same tensors. Its result is held against float64 first, and a wrong one is an error, not a time.
A time is the median over replays of a CUDA graph whose calls walk through enough sets of operands that none is in the
L2 cache when its turn comes. Bytes count each present adapter once; percentages are of this run's own ceilings.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import hide_root
from bench.clock import Timer, ceilings, graph_seconds
from bench.layer import layer_share
from bench.operands import BOUND, Operands
from bench.parts import describe_part, no_device, save_part
from bench.peers.kernel_forms import AbsentError, Form, Gather, Loop, Ours, routed
from bench.points import Ceilings, Point, percents, points, sets_of

METHOD = (
    "CUDA graph, median of 21 replays of at least 2 ms (20% and 80% quantiles), operands rotated through four times "
    "the L2 cache, bfloat16, rows sorted by adapter; routing is made before and not timed, for anyone."
)


def measure(
    point: Point,
    forms: Sequence[Form],
    timer: Timer,
    reached: Ceilings,
    device: torch.device,
    cache_bytes: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """One point in plain values: what it must move and compute, and each form's time, or why there is none."""
    operands = Operands.make(point, sets_of(point.bytes(), cache_bytes), device, dtype)
    found: dict[str, Any] = {
        "name": point.name,
        **asdict(point),
        "decode": point.decode,
        "bytes": point.bytes(),
        "flops": point.flops(),
        "sets": operands.sets,
        "forms": {},
    }
    if device.type == "cuda":
        found["launch"] = launch_of(operands)
    for form in forms:
        try:
            found["forms"][form.name] = _one(form, operands, timer, reached)
        except AbsentError as error:
            found["forms"][form.name] = {"absent": str(error)}
        except Exception as error:  # a peer that does not compile here must not take the others' numbers along
            found["forms"][form.name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    return found


def _one(form: Form, operands: Operands, timer: Timer, reached: Ceilings) -> dict[str, Any]:
    call = form.prepare(operands)
    operands.reset()
    for number in range(operands.sets):  # all of them: some forms keep tables for each, which no graph may make
        call(number)
    error = max(map(operands.error, {0, operands.sets - 1}), key=lambda one: float("inf") if one != one else one)
    if not error < BOUND:
        return {"wrong": error}
    seconds = timer(call, operands.sets)
    return {"error": error, "seconds": seconds, **percents(operands.point, seconds["median"], reached)}


def launch_of(operands: Operands) -> dict[str, Any]:
    """What the product's plan decides for the point."""
    from loramill.kernels.on_device import plan_of, shape_of

    siblings, rank = operands.a.shape[2:4]
    _, routing = routed(operands)
    if routing.alone is not None:
        return {"regime": "single"}
    shape = shape_of(operands.x[0], rank, operands.y.shape[2], routing)
    chosen = plan_of(operands.x.device).launch(shape, routing.tiles, siblings * rank)
    return {"height": routing.height, **asdict(chosen)}


def peers(options: argparse.Namespace) -> tuple[list[Form], dict[str, str]]:
    """The peers from checkouts, and why one is absent."""
    forms: list[Form] = []
    absent = {}
    for name in ("vllm", "sglang"):
        root = getattr(options, name)
        try:
            if root is None:
                raise AbsentError(f"no checkout was given (--{name} PATH)")
            if name == "vllm":
                from bench.peers.vllm_kernels import Vllm

                forms.append(Vllm(root))
            else:
                from bench.peers.sglang_kernels import sglang_forms

                forms.extend(sglang_forms(root))
        except AbsentError as error:
            absent[name] = str(error)
    return forms, absent


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, metavar="PATH", help="a checkout of vLLM, whose kernels are measured too")
    parser.add_argument("--sglang", type=Path, metavar="PATH", help="likewise SGLang")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no point after this (default 6.5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only points whose names hold TEXT")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if no_device("kernels"):
        return 1
    started = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    reached = ceilings(device, graph_seconds)
    theirs, absent = peers(options)
    forms: list[Form] = [Ours(), Loop(), Gather(), *theirs]
    _say(f"copy {reached.copy / 1e12:.2f} TB/s, bf16 GEMM {reached.gemm / 1e12:.0f} TFLOP/s; absent: {absent}")
    layers = [layer_share(graph_seconds, device, rank) for rank in (16, 64)] if not options.only else []
    for layer in layers:
        _say(f"layer, rank {layer['rank']}: {layer['alone_percent']:.1f}% alone, {layer['added_percent']:.1f}% added")
    result = describe_part("kernels", ["python -m bench.kernels", *map(str, arguments)]) | {
        "method": METHOD,
        "ceilings": asdict(reached),
        "l2_bytes": cache_bytes,
        "titles": {form.name: form.title for form in forms},
        "absent": absent,
        "layers": layers,
        "points": [],
        "skipped": [],
    }
    done = result["points"]
    for point in [one for one in points() if options.only in one.name]:
        if time.monotonic() - started > options.minutes * 60:
            result["skipped"].append(point.name)
            continue
        done.append(measure(point, forms, graph_seconds, reached, device, cache_bytes))
        _say(f"{point.name}: " + ", ".join(map(_short, done[-1]["forms"].items())))
        save_part(result, whole=not options.only)  # each time: what is stopped has what it measured until then
        gc.collect()
        torch.cuda.empty_cache()
    # A quick look at some points does not replace the numbers that the documents show.
    _say(f"written to {save_part(result, whole=not options.only)}")
    return 1 if any("seconds" not in one["forms"]["loramill"] for one in done) else 0


def _short(item: tuple[str, dict[str, Any]]) -> str:
    name, found = item
    if "seconds" in found:
        return f"{name} {found['seconds']['median'] * 1e6:.1f} us ({found['of_bound']:.0f}%)"
    return f"{name} {next(iter(found))}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
