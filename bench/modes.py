"""`python -m bench.modes`: --lora-mode auto beside dynamic and static, on four shapes of job, in interleaved rounds.

A smaller model than `python -m bench` has: what is asked is whether `auto` chooses well, which sixty runs answer better
than six.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import ROOT, command, hide_root
from bench.figures import spread
from bench.job import Job, Spec, describe, prepare
from bench.keep import keep

SMALL = Spec(
    layers=6, hidden=512, intermediate=1408, heads=8, kv_heads=4, vocab=8192, prompt_tokens=64, output_tokens=32
)
SHAPES = {
    "one adapter": replace(SMALL, rows=1024, adapters=1),
    "4 heavy": replace(SMALL, rows=1024, adapters=4, zipf=0.0),
    "16 Zipf": replace(SMALL, rows=1024, adapters=16),
    "256 with 4 rows each": replace(SMALL, rows=1024, adapters=256, zipf=0.0),
}
MODES = ("dynamic", "static", "auto")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.modes", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where models and jobs are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "modes.json")
    options = parser.parse_args(arguments)
    found = {
        "shapes": {shape: _measure(shape, options) for shape in options.shapes},
    }
    keep(options.out, "modes", "bench.modes", arguments, found)
    return 0


def _measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    job = prepare(SHAPES[shape], options.dir)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    details: dict[str, Any] = {}
    for number in range(options.repeats):
        # Another first each round: what a machine does over minutes falls on all alike.
        for mode in MODES[number % 3 :] + MODES[: number % 3]:
            summary, lines = command.run(_arguments(job, mode))
            assert len(lines) == job.spec.rows
            seconds[mode].append(summary["run_s"])
            details[mode] = {"modes": _modes(lines), **{key: summary[key] for key in ("adapter_loads", "merges")}}
            print(f"{shape}, {number + 1}: {mode} {summary['run_s']:.2f} s", file=sys.stderr, flush=True)
    rounds = list(zip(seconds["auto"], seconds["dynamic"], seconds["static"], strict=True))
    medians = {mode: spread(values) for mode, values in seconds.items()}
    better = min(("dynamic", "static"), key=lambda mode: medians[mode].median)
    return {
        "job": describe(job),
        "run_s": seconds,
        "better": better,
        "auto_over_better": [auto / (dynamic if better == "dynamic" else static) for auto, dynamic, static in rounds],
        "details": details,
    }


def _modes(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many rows each mode answered."""
    modes = [line["response"]["body"]["loramill"]["mode"] for line in lines]
    return {mode: modes.count(mode) for mode in sorted(set(modes))}


def _arguments(job: Job, mode: str) -> list[str]:
    return [
        *("-i", str(job.input_file(lora=True))),
        *("--base-model", str(job.base)),
        *("--adapters-dir", str(job.adapters)),
        *("--dtype", "bfloat16"),
        *("--device", "cpu"),
        *("--lora-mode", mode),
    ]


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
