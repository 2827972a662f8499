"""`python -m bench`: run the job through every runner, check tokens, print the table, keep the JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import ROOT, hide_root, machine
from bench.figures import TokensError
from bench.job import Spec, describe, prepare
from bench.peers.runner import runners
from bench.report import table
from bench.rounds import RunnerError, measure

DEFAULT = Spec()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    every = list(runners())
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--runners", nargs="+", choices=every, default=every, metavar="NAME", help=" ".join(every))
    parser.add_argument("--rows", type=int, default=DEFAULT.rows, help=f"rows of the job (default {DEFAULT.rows})")
    parser.add_argument("--layers", type=int, default=DEFAULT.layers, help=f"default {DEFAULT.layers}; 2 is quick")
    parser.add_argument(
        "--minutes", type=float, default=14.5, help="start no round that would pass this (default 14.5)"
    )
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the model and job are kept")
    parser.add_argument("--out", type=Path, help="results file (default bench/results/ for the whole default job)")
    options = parser.parse_args(arguments)
    for name in ("repeats", "rows", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    spec = Spec(layers=options.layers, rows=options.rows)
    name = f"qwen2-{spec.parameters() / 1e6:.0f}m-{spec.adapters}-adapters"
    # Anything but the whole default job is a quick look: it does not replace the numbers that the documents show.
    whole = spec == DEFAULT and options.runners == list(runners())
    out = options.out or (ROOT / "bench" / "results" if whole else options.dir / "results") / f"{name}.json"
    hardware = machine.hardware()
    job = prepare(spec, options.dir)
    try:
        measured = measure(job, options.runners, options.repeats, options.minutes, _say)
    except (RunnerError, TokensError) as error:
        _say(str(error))
        return 1
    result = {
        "name": name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": " ".join(["python -m bench", *arguments]),
        "hardware": hardware,
        "versions": machine.versions(),
        "job": describe(job),
        **measured,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    _say(f"written to {out}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
