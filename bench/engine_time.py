"""`python -m bench.engine_time`: what share of a pass the engine spends outside the model's forward pass.

256 rows decode at once on a CPU, without LoRA and over 16 adapters: scheduling, packing, drawing and emitting around
each forward pass, which has a clock of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import ROOT, hide_root
from bench.figures import spread
from bench.job import Job, describe, prepare
from bench.keep import keep
from bench.named import MAIN

ROWS = 256
SPEC = replace(MAIN, rows=ROWS, prompt_tokens=32, output_tokens=48)
PASSES = {"no LoRA": 0, "16 adapters": 16}
"""Slots, by what the pass is called."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_time", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--layers", type=int, default=SPEC.layers, help=f"default {SPEC.layers}")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the model and job are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "engine-time.json")
    options = parser.parse_args(arguments)
    job = prepare(replace(SPEC, layers=options.layers), options.dir)
    steppers = {name: stepper(job, slots) for name, slots in PASSES.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in PASSES}
    for _ in range(options.repeats):
        for name, step in steppers.items():
            rounds[name].append(share(step()))
            print(f"{name}: {rounds[name][-1]['outside']:.2%} of a pass", file=sys.stderr, flush=True)
    found = {
        "job": describe(job),
        "passes": {
            name: {"title": name} | {key: asdict(spread([one[key] for one in found])) for key in found[0]}
            for name, found in rounds.items()
        },
    }
    keep(options.out, "engine-time", "bench.engine_time", arguments, found)
    return 0


def share(passes: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Medians over passes of (seconds of the pass, seconds of its forward)."""
    return {
        "pass_s": median(whole for whole, _ in passes),
        "outside_s": median(whole - inside for whole, inside in passes),
        "outside": median((whole - inside) / whole for whole, inside in passes),
    }


def stepper(job: Job, slots: int) -> Callable[[], list[tuple[float, float]]]:
    """What runs the job once more through one engine: the seconds of each pass in which every row decoded."""
    from bench.peers.engine import EngineRunner

    runner = EngineRunner(slots, "cpu", ROWS)
    runner.load(job)
    model: Any = runner.model._model
    forward = model.forward
    inside = [0.0]

    def timed(batch: Any) -> Any:
        began = time.perf_counter()
        logits = forward(batch)
        inside[0] = time.perf_counter() - began
        return logits

    model.forward = timed

    def run() -> list[tuple[float, float]]:
        passes = []
        runner.add(job)
        while runner.model.has_work:
            before, began = runner.model.stats.completion_tokens, time.perf_counter()
            runner.model.step()
            whole = time.perf_counter() - began
            if runner.model.stats.completion_tokens - before == ROWS:
                passes.append((whole, inside[0]))
        return passes

    return run


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
