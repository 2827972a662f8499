"""`python -m bench.simulate`: the planner against arrival order, on a job and a cluster that are simulated."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import ROOT, hide_root
from bench.cluster import Outcome, Rows, Setting, Strategy, simulate
from bench.keep import keep
from loramill.producer.costs import Timing, fit
from loramill.producer.plan import Plan, plan
from loramill.producer.waves import Limits, MixFacts

Ints = NDArray[np.int64]

MEASURED = (
    Timing(4.24, tokens=8192),
    Timing(0.103, rows=128),
    Timing(0.085, rows=103),
    Timing(0.032, rows=25),
    Timing(0.129, rows=128, adapters=16),
    Timing(0.104, rows=103, adapters=8),
    Timing(0.046, rows=25, adapters=8),
)
"""Of the 100.7M model on two cores, from docs/performance.md. LoRA's share of a prompt was not timed: it is 0."""
LOAD_S, READ_S = 0.0038, 0.0047
"""Medians over that job's 16 adapters: `put` into every projection, and `Adapter.deltas` (from the page cache)."""
SOURCE = (
    'the passes of the 100.7M-parameter model on two CPU cores under "Where the time goes", and 3.8 ms to put an '
    "adapter of rank 16 into a slot and 4.7 ms to read it, measured on the same kind of machine"
)


@dataclass(slots=True, frozen=True)
class Spec:
    """The job and the machines that are simulated."""

    rows: int = 1_000_000
    adapters: int = 10_000
    zipf: float = 1.0
    base_share: float = 0.05
    prompt_tokens: tuple[int, int] = (50, 250)
    max_tokens: tuple[int, int] = (32, 128)
    answered: tuple[float, float] = (0.25, 1.0)
    """Share of max_tokens that an answer really has: the planner does not know it."""
    workers: int = 64
    slots: int = 8
    max_num_seqs: int = 128
    shard_rows: int = 512
    host: int = 1000
    seed: int = 0


STRATEGIES = {
    "plan": Strategy("resident first", "pass over", "unneeded"),
    "fifo": Strategy("in order", "wait", "lru"),
    "sorted": Strategy("in order", "pass over", "lru"),
}
TITLES = {
    "plan": "the plan",
    "fifo": "arrival order, LRU",
    "sorted": "arrival order sorted in batches, LRU",
}


def make_job(spec: Spec) -> tuple[Rows, Ints]:
    """The shuffled rows, and the most tokens that each answer may have."""
    rng = np.random.default_rng(spec.seed)
    weights = 1 / np.arange(1, spec.adapters + 1) ** spec.zipf
    adapter = rng.choice(spec.adapters, spec.rows, p=weights / weights.sum())
    adapter[rng.random(spec.rows) < spec.base_share] = -1
    prompt, limit = (rng.integers(low, high, spec.rows) for low, high in (spec.prompt_tokens, spec.max_tokens))
    answer = np.maximum(1, limit * rng.uniform(*spec.answered, spec.rows)).astype(np.int64)
    return Rows(adapter.astype(np.int64), prompt, answer), limit


def planned_shards(made: Plan, shard_rows: int) -> Iterator[Ints]:
    """Consecutive waves, together about `shard_rows` rows; a wave of more is cut."""
    parts: list[Ints] = []
    size = 0
    for wave in made.waves:
        for part in np.array_split(wave.rows, -(-len(wave.rows) // shard_rows)):
            if size + len(part) > shard_rows:
                yield np.concatenate(parts)
                parts, size = [], 0
            parts.append(part)
            size += len(part)
    if parts:
        yield np.concatenate(parts)


def arrival_shards(rows: Rows, shard_rows: int, *, batch: int = 0) -> Iterator[Ints]:
    """Rows as they come; with `batch`, so many at a time are sorted by adapter."""
    order = np.arange(len(rows.adapter))
    if batch:
        order = order[np.lexsort((rows.adapter, order // batch))]
    for start in range(0, len(order), shard_rows):
        yield order[start : start + shard_rows]


def run(spec: Spec) -> dict[str, Any]:
    """Every strategy on the same rows."""
    costs = fit(MEASURED, load_s=LOAD_S, read_s=READ_S)
    rows, limit = make_job(spec)
    facts = [MixFacts((adapter,), 16) for adapter in range(spec.adapters)]
    limits = Limits(spec.slots, spec.max_num_seqs, 8192)
    began = time.process_time()
    made = plan(rows.adapter.astype(np.int32), rows.prompt, limit, facts, limits, mode="dynamic")
    plan_s = time.process_time() - began
    look_ahead = 4 * spec.max_num_seqs
    setting = Setting(spec.workers, spec.slots, spec.max_num_seqs, look_ahead, spec.host, costs)
    runs: dict[str, dict[str, Any]] = {}
    for name, strategy in STRATEGIES.items():
        if name == "plan":
            shards = list(planned_shards(made, spec.shard_rows))
        else:
            shards = list(arrival_shards(rows, spec.shard_rows, batch=look_ahead if name == "sorted" else 0))
        began = time.process_time()
        outcome = simulate(rows, shards, setting, strategy)
        runs[name] = _numbers(outcome, spec, int(rows.answer.sum())) | {"cpu_s": time.process_time() - began}
        print(f"{TITLES[name]}: {runs[name]}", file=sys.stderr, flush=True)
    used = len(np.unique(rows.adapter[rows.adapter >= 0]))
    return {
        "costs": asdict(costs),
        "plan_cpu_s": plan_s,
        "adapters_named": used,
        "look_ahead": look_ahead,
        "runs": runs,
    }


def _numbers(outcome: Outcome, spec: Spec, tokens: int) -> dict[str, Any]:
    if outcome.rows != spec.rows:
        raise AssertionError(f"{outcome.rows} of {spec.rows} rows were answered")
    return {
        "makespan_s": outcome.makespan_s,
        "output_tokens_per_s": tokens / outcome.makespan_s,
        "idle_share": 1 - outcome.busy_s / (spec.workers * outcome.makespan_s),
        "loads": outcome.loads,
        "swaps": outcome.evictions,
        "reads": outcome.reads,
        "passes": outcome.passes,
    }


def main(arguments: Sequence[str]) -> int:
    default = Spec()
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__)
    for name in ("rows", "adapters", "workers", "slots"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="default %(default)s")
    parser.add_argument("--out", type=Path, help="results file (default bench/results/ for the default simulation)")
    options = parser.parse_args(arguments)
    spec = Spec(rows=options.rows, adapters=options.adapters, workers=options.workers, slots=options.slots)
    name = f"simulation-{spec.rows}-rows-{spec.adapters}-adapters-{spec.workers}-workers"
    folder = ROOT / "bench" / "results" if spec == default else ROOT / ".cache" / "bench" / "results"
    out = options.out or folder / f"{name}.json"
    found = {
        "name": name,
        "source": SOURCE,
        "titles": TITLES,
        "spec": asdict(spec),
        **run(spec),
    }
    keep(out, "simulation", "bench.simulate", arguments, found)
    print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
