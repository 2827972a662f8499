"""`python -m bench.report [FILE ...]`: write the measured tables into the documents, from `bench/results/*.json`.

A document says where with a pair of markers, `<!-- bench:NAME -->` and `<!-- /bench -->`; what lies between is
replaced. Of `python -m bench`, `summary` is the main point, `points` every one, and `targets` what was asked of them;
`gpu` is what `make gpu` measured, or that it has not yet; `engine`, `operations`, `simulation`, `modes`, `thousand`,
`queue` and `serve` are what the programs in bench/ found. The plots go beside the documents.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import (
    ROOT,
    adapters_report,
    gpu_report,
    operations_report,
    point_report,
    queue_report,
    serve_report,
    simulation_report,
)
from bench.plot import plot

RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
Results = Sequence[Mapping[str, Any]]


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every result, by file name; `part` says which program made it, and `python -m bench` leaves it out."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def render(document: str, results: Results) -> str:
    """`document` with its marked sections made anew; a document without markers comes back as it was."""
    points = _of(results, "main")
    gpu = [one for one in results if "part" in one and one["part"] not in _OTHERS]
    sections = {
        "summary": point_report.summary(points),
        "points": point_report.section(points),
        "targets": point_report.targets([*points, *_of(results, "engine-time")]),
        "gpu": gpu_report.section(gpu),
        **{part.partition("-")[0]: section(_of(results, part)) for part, section in _OTHERS.items()},
    }
    return SECTION.sub(lambda match: f"{match[1]}{sections[match[2]]}{match[3]}", document)


_OTHERS = {
    "engine-time": point_report.engine_time,
    "operations": operations_report.section,
    "simulation": simulation_report.section,
    "modes": adapters_report.modes,
    "thousand": adapters_report.thousand,
    "queue": queue_report.section,
    "serve": serve_report.section,
}


def plots(results: Results) -> dict[str, str]:
    """File name -> SVG."""
    kernels = {gpu_report.plot_name(one): plot(one["points"], one["titles"]) for one in _of(results, "kernels")}
    simulations = {
        simulation_report.plot_name(one): plot(simulation_report.points(one), one["titles"])
        for one in _of(results, "simulation")
    }
    return {**kernels, **simulations, **point_report.plots(_of(results, "main"))}


def _of(results: Results, part: str) -> list[Mapping[str, Any]]:
    return [result for result in results if result.get("part", "main") == part]


def main(files: Sequence[str]) -> int:
    """Rewrite `files`, by default those documents of the repository that exist."""
    results = load()
    if not _of(results, "main"):
        print(f"no results in {RESULTS}: run `make bench ARGS='--out bench/results'` first", file=sys.stderr)
        return 1
    for name, drawn in plots(results).items():
        (ROOT / "docs" / name).write_text(drawn)
    for file in [Path(name) for name in files] or [path for path in DOCUMENTS if path.exists()]:
        before = file.read_text()
        if not SECTION.search(before):
            print(f"{file}: no <!-- bench:... --> with a name that this program knows", file=sys.stderr)
            return 1
        file.write_text(render(before, results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
