"""`python -m bench.operations`: the least time of every operation of the main job, without LoRA and over 16 adapters.

Both engines run the job in one process, a pass of one and a pass of the other: a machine that is slower by the minute
is so for both, and the ratio of a round tells them apart where runs of their own cannot. Each operation of each pass
counts with the least time that it took in any round; how fast memory is read stands beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from bench import ROOT, hide_root
from bench.job import Job, Spec, describe, prepare
from bench.keep import keep
from bench.named import MAIN

SLOTS = {"no LoRA": 0, "16 adapters": 16}
OPERATIONS = {"roped": "qkv_rotation", "attend": "attention", "normed": "out_down_norm", "gated": "gate_up"}
"""What a layer calls, and what it is in the results; all else of a pass is `rest`."""
Timed = tuple[str, float]
Key = tuple[str, int, int, str]
"""Phase, number of the pass, place in it, operation."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.operations", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--layers", type=int, default=MAIN.layers, help=f"default {MAIN.layers}")
    parser.add_argument("--rows", type=int, default=MAIN.rows, help=f"default {MAIN.rows}")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the model and job are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "operations.json")
    options = parser.parse_args(arguments)
    job = prepare(Spec(layers=options.layers, rows=options.rows), options.dir)
    calls = _watched()
    runs = {name: _runner(job, slots, calls) for name, slots in SLOTS.items()}
    least: dict[str, dict[Key, float]] = {name: {} for name in SLOTS}
    rounds: list[dict[str, float]] = []
    read = 0.0
    for number in range(options.repeats):
        read = max(read, read_bytes_s())
        rounds.append(dict.fromkeys(SLOTS, 0.0))
        for passes in zip_longest(*(run() for run in runs.values()), fillvalue=[]):
            for name, timed in zip(runs, passes, strict=True):
                for key, seconds in timed:
                    least[name][key] = min(seconds, least[name].get(key, seconds))
                    rounds[-1][name] += seconds
        said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in rounds[-1].items())
        print(f"round {number + 1}: {said}", file=sys.stderr, flush=True)
    found = {
        "job": describe(job),
        "rounds_s": rounds,
        "read_bytes_s": read,
        "bytes_of_pass": bytes_of_pass(job.spec),
        "seconds": {name: by_operation(found) for name, found in least.items()},
    }
    keep(options.out, "operations", "bench.operations", arguments, found)
    return 0


def by_operation(least: dict[Key, float]) -> dict[str, dict[str, float]]:
    """Seconds of each phase by operation."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (phase, _, _, operation), seconds in least.items():
        found[phase][operation] += seconds
    return {phase: dict(operations) for phase, operations in found.items()}


def bytes_of_pass(spec: Spec) -> dict[str, int]:
    """What a decode pass of all rows reads at the least, in bfloat16: the weights, the low-rank ones, and keys and
    values when half of each answer is there."""
    shapes = spec.linears()
    adapters, tokens = sum(spec.ranks()), spec.rows * (spec.prompt_tokens + spec.output_tokens // 2)
    return {
        "weights": 2 * spec.parameters(),
        "low_rank": 2 * spec.layers * adapters * sum(map(sum, shapes.values())),
        "keys_values": 2 * spec.layers * tokens * sum(shapes[f"self_attn.{name}"][0] for name in ("k_proj", "v_proj")),
    }


def read_bytes_s() -> float:
    """Bytes a second that torch sums of main memory with all its threads: the most of five."""
    import torch

    held = torch.zeros(2**26, dtype=torch.float32)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        held.sum()
        best = max(best, held.nbytes / (time.perf_counter() - began))
    return best


def _watched() -> list[Timed]:
    """Has the layers note each operation and its seconds in the list that is returned."""
    from loramill.worker import lean

    calls: list[Timed] = []

    def watch(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments, **named)
            calls.append((OPERATIONS[name], time.perf_counter() - began))
            return result

        setattr(owner, name, timed)

    for name in OPERATIONS:
        watch(lean if name == "attend" else lean.FusedLinear, name)
    return calls


def _runner(job: Job, slots: int, calls: list[Timed]) -> Callable[[], Iterator[list[tuple[Key, float]]]]:
    """What runs the job once more, pass by pass: each operation and its seconds."""
    from bench.peers.engine import EngineRunner

    runner = EngineRunner(slots, "cpu", job.spec.rows, prefix_sharing=False)
    runner.load(job)
    engine = runner.model

    def run() -> Iterator[list[tuple[Key, float]]]:
        runner.add(job)
        for number in count():
            if not engine.has_work:
                return
            prompts = engine.stats.prompt_tokens
            calls.clear()
            began = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - began
            phase = "prefill" if engine.stats.prompt_tokens > prompts else "decode"
            timed = [*calls, ("rest", whole - sum(seconds for _, seconds in calls))]
            yield [((phase, number, place, operation), seconds) for place, (operation, seconds) in enumerate(timed)]

    return run


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
