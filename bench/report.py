"""`python -m bench.report [FILE ...]`: write the measured tables into the documents, from `bench/results/*.json`.

A document says where with a pair of markers, `<!-- bench:NAME -->` and `<!-- /bench -->`; what lies between is
replaced. Of `make bench`, `summary` is one table and `results` every table with its job, hardware and versions; `gpu`
is what `make gpu` measured, or that it has not yet; `simulation`, `modes`, `thousand`, `queue` and `serve` are what the
programs of these names in bench/ found. The plots of the kernels and of the simulation go beside the documents.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import ROOT, adapters_report, gpu_report, queue_report, serve_report, simulation_report
from bench.plot import plot

RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
OURS = ("loramill", "loramill-16", "loramill-base")
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
Results = Sequence[Mapping[str, Any]]


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every result, by file name; `part` says which program made it, and `make bench` leaves it out."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def render(document: str, results: Results) -> str:
    """`document` with its marked sections made anew; a document without markers comes back as it was."""
    main, gpu = _of(results, "main"), [one for one in results if "part" in one and one["part"] not in _OTHERS]
    sections = {
        "summary": "\n".join(f"{table(result)}\n\n{setting(result)}\n" for result in main),
        "results": "\n".join(detail(result) for result in main),
        "gpu": gpu_report.section(gpu),
        **{part: section(_of(results, part)) for part, section in _OTHERS.items()},
    }
    return SECTION.sub(lambda match: f"{match[1]}{sections[match[2]]}{match[3]}", document)


_OTHERS = {
    "simulation": simulation_report.section,
    "modes": adapters_report.modes,
    "thousand": adapters_report.thousand,
    "queue": queue_report.section,
    "serve": serve_report.section,
}


def _of(results: Results, part: str) -> list[Mapping[str, Any]]:
    return [result for result in results if result.get("part", "main") == part]


def table(result: Mapping[str, Any]) -> str:
    """One row per runner: rates with their range, then how loramill compares with it."""
    lines = [
        "| | output tokens/s, median (range) | loramill, 8 slots, is | 16 slots | no LoRA |",
        "|---|---|---|---|---|",
    ]
    for name, runner in result["runners"].items():
        compared = [_ratio(result["ratios"].get(f"{ours} / {name}")) for ours in OURS]
        lines.append(f"| {runner['title']} | {_range(runner['output_tokens_per_s'], '.0f')} | {' | '.join(compared)} |")
    lines += [f"| {name} | absent: {reason} | | | |" for name, reason in result["absent"].items()]
    return "\n".join(lines)


def setting(result: Mapping[str, Any]) -> str:
    """Job and machine in one paragraph."""
    job, hardware = result["job"], result["hardware"]
    flags = f" ({', '.join(hardware['bf16'])})" if hardware["bf16"] else ""
    rounds = max((len(runner["run_s"]) for runner in result["runners"].values()), default=0)
    return (
        f"{job['rows']} rows over {job['adapters']} adapters (Zipf {job['zipf']:g}; rank {job['rank']} on "
        f"{job['targets']}), {job['prompt_tokens']} prompt + {job['output_tokens']} output tokens a row; a random "
        f"Qwen2 shape of {job['parameters'] / 1e6:.1f}M parameters in {job['dtype']}; {hardware['cores']} cores of "
        f"{hardware['cpu']}{flags}, {hardware['memory_gib']:g} GiB; {rounds} interleaved rounds, {result['date']}."
    )


def detail(result: Mapping[str, Any]) -> str:
    """Everything about one result: table, ratios, agreement, job, machine, versions, command."""
    job = result["job"]
    shape = (
        f"{job['layers']} layers, hidden {job['hidden']}, intermediate {job['intermediate']}, {job['heads']} heads, "
        f"{job['kv_heads']} key-value heads, vocabulary {job['vocab']} (tied)"
    )
    checked = [
        "| | seconds of each round | seconds to load | same first token | tokens before a difference | same rows |",
        "|---|---|---|---|---|---|",
    ]
    for runner in result["runners"].values():
        seconds = ", ".join(f"{value:.2f}" for value in runner["run_s"])
        loads = ", ".join(f"{value:.1f}" for value in runner["load_s"])
        same = [f"{runner['agreement'][key]:.1%}" if runner["agreement"] else "" for key in ("first", "tokens", "rows")]
        checked.append(f"| {runner['title']} | {seconds} | {loads} | {' | '.join(same)} |")
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in result["versions"].items())
    others = [value for runner in result["runners"].values() for value in runner["others_cores"]]
    noise = f"Other processes kept at most {max(others):.2f} cores busy during a run." if others else ""
    commands = [runner["details"]["command"] for runner in result["runners"].values() if "command" in runner["details"]]
    return "\n".join(
        [
            f"### {result['name']}",
            "",
            table(result),
            "",
            setting(result),
            f"Shape: {shape}. {versions}; {result['hardware']['threads']} threads for each. {noise}",
            "Ratios are medians (ranges) of the rounds' own ratios. Loading the model is not timed; loramill's time "
            "includes loading and evicting adapters, PEFT's adapters are all loaded beforehand.",
            "",
            *checked,
            "",
            "Tokens are those of the first round, compared with PEFT's mixed batch (with adapters) or transformers "
            "(without). In bfloat16 each program rounds in its own places, PEFT's two forms in the same ones, and one "
            "near tie parts a row for good; in float32 the tests hold every token equal. No row is short of a token.",
            "",
            "```",
            result["command"],
            *commands,
            "```",
            "",
        ]
    )


def _range(values: Mapping[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['low']:{form}}-{values['high']:{form}})"


def _ratio(values: Mapping[str, float] | None) -> str:
    return f"{_range(values, '.2f')}x" if values else ""


def main(files: Sequence[str]) -> int:
    """Rewrite `files`, by default those documents of the repository that exist."""
    results = load()
    if not _of(results, "main"):
        print(f"no results in {RESULTS}: run `make bench` first", file=sys.stderr)
        return 1
    for result in _of(results, "kernels"):
        (ROOT / "docs" / gpu_report.plot_name(result)).write_text(plot(result["points"], result["titles"]))
    for result in _of(results, "simulation"):
        drawn = plot(simulation_report.points(result), result["titles"])
        (ROOT / "docs" / simulation_report.plot_name(result)).write_text(drawn)
    for file in [Path(name) for name in files] or [path for path in DOCUMENTS if path.exists()]:
        before = file.read_text()
        if not SECTION.search(before):
            print(f"{file}: no <!-- bench:... --> with a name that this program knows", file=sys.stderr)
            return 1
        file.write_text(render(before, results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
