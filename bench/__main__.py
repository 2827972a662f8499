"""`python -m bench`: run the named points through their runners, check tokens, print the tables, keep the JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bench import ROOT, hide_root, machine
from bench.figures import TokensError
from bench.job import describe, prepare
from bench.named import POINTS
from bench.peers.runner import PEERS, runners
from bench.point_report import table
from bench.rounds import Race, RunnerError, measure
from bench.targets import HEAD, judge


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    every = list(runners())
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--points", nargs="+", choices=[*POINTS, "all"], metavar="NAME", help=f"all, or of {' '.join(POINTS)}"
    )
    parser.add_argument("--runners", nargs="+", choices=every, metavar="NAME", help=" ".join(every))
    parser.add_argument("--peers", action="store_true", help="with those that have environments of their own")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--rows", type=int, help="at most so many rows of each point, for a quick look")
    parser.add_argument("--layers", type=int, help="of the random models, for a quick look")
    parser.add_argument("--minutes", type=float, default=14, help="begin nothing that would pass this (default 14)")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where models and jobs are kept")
    parser.add_argument("--out", type=Path, help="folder of the results (default DIR/results)")
    options = parser.parse_args(arguments)
    for name in ("repeats", "rows", "layers"):
        if (getattr(options, name) or 1) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    started = time.monotonic()
    out = options.out or options.dir / "results"
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": " ".join(["python -m bench", *arguments]),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
    }
    races = [_race(name, options) for name in _chosen(options)]
    jobs = {race.name: describe(race.job) for race in races}
    results = {}

    def keep(race: Race) -> None:
        results[race.name] = {"name": race.name, **about, "job": jobs[race.name], **race.summary()}
        (out / f"{race.name}.json").write_text(json.dumps(results[race.name], indent=2) + "\n")

    try:
        measure(races, options.repeats, options.minutes - (time.monotonic() - started) / 60, _say, keep)
    except (RunnerError, TokensError) as error:
        _say(str(error))
        return 1
    for name, result in results.items():
        print(f"\n{name}: {POINTS[name].about}\n\n{table(result)}")
    if not options.rows and not options.layers:
        print("\n".join(["", HEAD, *(one.row() for one in judge(list(results.values())) if one.found)]))
    _say(f"written to {out}")
    return 0


def _chosen(options: argparse.Namespace) -> list[str]:
    if options.points:
        return list(POINTS) if "all" in options.points else options.points
    return [name for name, point in POINTS.items() if point.quick]


def _race(name: str, options: argparse.Namespace) -> Race:
    point = POINTS[name]
    spec = replace(point.spec, rows=min(options.rows or point.spec.rows, point.spec.rows))
    if options.layers and not spec.tiny:
        spec = replace(spec, layers=options.layers)
    wanted = options.runners or [one for one in point.runners if options.peers or one not in PEERS]
    asked = [one for one in point.runners if one in wanted]
    return Race(name, prepare(spec, options.dir), asked, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
