"""`python -m bench.gpu_engine`: loramill on this GPU, with LoRA against without, and its decode step against its floor.

Two engines stand loaded side by side: no LoRA, and 32 adapters over 16 slots, so that every round loads adapters. They
run the same rows in turn, round after round. Before that, decode steps: 32, 128 and 256 rows that all decode at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import ROOT, hide_root
from bench.clock import ceilings, graph_seconds
from bench.figures import TokensError, agreement, check_agreement, check_counts
from bench.gpu_job import SPEC, first, others, prepare, setting, warm_up, weights
from bench.job import Job, Spec
from bench.parts import describe_part, no_device, save_part
from bench.peers.engine import EngineRunner
from bench.points import Ceilings
from loramill.worker.request import Request, Sampling, plain

BATCH_ROWS = 256
"""Rows that run at once: the engine's default on CUDA."""
SLOTS = 16
DECODE_ROWS = (32, 128, 256)
DECODE_TOKENS = 96
UNSETTLED = 32
"""Decode passes that are not counted: graphs are captured in the first ones."""
ROUNDS = 5


def runners(device: str) -> list[EngineRunner]:
    return [EngineRunner(0, device, BATCH_ROWS), EngineRunner(SLOTS, device, BATCH_ROWS)]


def floor(spec: Spec, rows: int, length: float, found: Ceilings) -> dict[str, float]:
    """What a decode step of `rows` rows of `length` tokens must at least take: seconds, and what they are made of."""
    cache = rows * length * spec.layers * 2 * spec.kv_heads * (spec.hidden // spec.heads) * 2
    moved = 2 * weights(spec) + cache
    computed = 2 * rows * weights(spec) + 4 * rows * length * spec.hidden * spec.layers
    return {"bytes": moved, "flops": computed, "floor_s": max(moved / found.copy, computed / found.gemm)}


def decode_steps(runner: EngineRunner, job: Job, rows: int) -> list[tuple[float, float, float]]:
    """(seconds from one pass to the next, of its forward, mean length) where `rows` rows decode at once."""
    engine: Any = runner.model
    forward, inside = watched(engine._model)
    for number, row in enumerate(others(job, rows, DECODE_TOKENS).rows()):
        how = Sampling(DECODE_TOKENS, temperature=0, ignore_eos=True)
        engine.add(Request(number, row.prompt, how, plain(runner._hashes.get(row.adapter))))
    passes = []
    try:
        while engine.has_work:
            before, began = engine.stats.completion_tokens, time.perf_counter()
            lengths = [len(one.tokens) for one in engine._scheduler.running]
            engine.step()
            whole = time.perf_counter() - began
            if len(lengths) == rows and engine.stats.completion_tokens - before == rows:
                passes.append((whole, inside(int(engine._flights.overlap)), sum(lengths) / rows))
    finally:
        engine._model.forward = forward
    return passes


def watched(model: Any) -> tuple[Callable[..., Any], Callable[[int], float]]:
    """Put a clock around a model's forward: what it was, and the seconds on the device of its last call but so many."""
    forward, on_device = model.forward, torch.cuda.is_available()
    calls: deque[tuple[Any, Any]] = deque(maxlen=2)

    def mark() -> Any:
        if not on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(batch: Any) -> Any:
        began = mark()
        logits = forward(batch)
        calls.append((began, mark()))
        return logits

    def seconds(behind: int) -> float:
        began, ended = calls[-1 - behind]
        return float(began.elapsed_time(ended) / 1e3 if on_device else ended - began)

    model.forward = timed
    return forward, seconds


def decode(runner: EngineRunner, job: Job, rows: int, found: Ceilings) -> dict[str, Any]:
    """One point: the median decode step, its floor, and the engine's own share of it."""
    passes = decode_steps(runner, job, rows)
    passes = passes[UNSETTLED:] if len(passes) > 2 * UNSETTLED else passes
    with runner.model.one_at_a_time():
        alone = decode_steps(runner, job, rows)
    step_s = median(whole for whole, _, _ in passes)
    least = floor(job.spec, rows, median(length for _, _, length in passes), found)
    return {
        "name": runner.name,
        "title": runner.title,
        "rows": rows,
        "passes": len(passes),
        "step_s": step_s,
        "one_at_a_time_s": median(whole for whole, _, _ in alone[-len(passes) :]),
        "outside": median(1 - inside / whole for whole, inside, _ in passes),
        **least,
        "of_floor": step_s / least["floor_s"],
    }


def measure(result: dict[str, Any], job: Job, loaded: Sequence[EngineRunner], until: Callable[[], bool]) -> None:
    """Rounds of all rows, each runner in turn, into `result`; kept after each, so that what is stopped has the others.

    Raises:
        TokensError: a run did not answer what was asked, or not what the first did.
    """
    ids = [row.custom_id for row in job.rows()]
    reference: dict[str, Any] = {}
    for number in range(ROUNDS):
        if number and until():
            result["stopped"] = f"after {number} of {ROUNDS} rounds, for time"
            break
        for runner in loaded:
            answers = runner.run(job)
            check_counts(runner.name, answers.tokens, ids, job.spec.output_tokens)
            found = agreement(answers.tokens, reference.setdefault(runner.name, answers.tokens))
            check_agreement(runner.name, found)
            one = result["runners"].setdefault(runner.name, {"title": runner.title, "run_s": [], "repeats": []})
            one["run_s"].append(answers.run_s)
            one["repeats"].append(found["rows"])
            one["details"] = answers.details
            say(f"{runner.name}: {answers.run_s:.2f} s")
        save_part(result)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_engine", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.5, help="start no round after this (default 6.5)")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the model and job are made")
    options = parser.parse_args(arguments)
    if no_device("engine"):
        return 1
    device, started = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic()
    job = prepare(SPEC, options.dir, device)
    say(f"made the job in {time.monotonic() - started:.0f} s")
    result = describe_part("engine", ["python -m bench.gpu_engine", *map(str, arguments)])
    found = limits(device)
    result |= {"setting": setting(SPEC), "job": asdict(SPEC), "ceilings": asdict(found), "decode": [], "runners": {}}
    loaded = runners(device)
    for runner in loaded:
        runner.load(job)
        runner.run(warm_up(job))
    say(f"loaded and warmed up after {time.monotonic() - started:.0f} s")
    for rows in DECODE_ROWS:
        for runner in loaded:
            point = decode(runner, job, rows, found)
            result["decode"].append(point)
            say(f"{runner.name}, {rows} rows: {point['step_s'] * 1e3:.2f} ms, {point['of_floor']:.2f} of its floor")
    save_part(result)
    try:
        measure(result, first(job, job.spec.rows), loaded, lambda: time.monotonic() - started > options.minutes * 60)
    except TokensError as error:
        say(str(error))
        return 1
    print(json.dumps({name: median(one["run_s"]) for name, one in result["runners"].items()}))
    say(f"written to {save_part(result)}")
    return 0


def limits(device: str) -> Ceilings:
    """The device's copy bandwidth and GEMM rate."""
    return ceilings(torch.device(device), graph_seconds)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
