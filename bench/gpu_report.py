"""The GPU's section of the documents: targets, tables and a plot from bench/results/<device>-<part>.json. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

Result = Mapping[str, Any]

NOT_MEASURED = (
    "**Not yet measured on a GPU.** `make gpu` measures it: one command on a machine with a CUDA device and Triton; "
    "the targets, tables and the plot then stand here. Nothing is estimated.\n"
)


@dataclass(frozen=True, slots=True)
class Target:
    """What was asked for, and the values that were measured for it, one a point."""

    asked: str
    least: float
    """Or the most, where `at_most`."""
    values: list[float]
    form: str = "{:.0f}%"
    at_most: bool = False

    def row(self) -> str:
        if not self.values:
            return f"| {self.asked} | not measured | |"
        met = sum(value <= self.least if self.at_most else value >= self.least for value in self.values)
        low, mid, high = (self.form.format(f(self.values)) for f in (min, median, max))
        spread = mid if len(self.values) == 1 else f"{mid} ({low} to {high})"
        return f"| {self.asked} | {spread} | {met} of {len(self.values)} |"


def targets(result: Result) -> list[Target]:
    """The issue's targets with what the file has for them."""
    measured = [one for one in result["points"] if "seconds" in one["forms"].get("loramill", {})]
    decode = [one["forms"]["loramill"]["of_copy"] for one in measured if one["decode"]]
    prefill = [one["forms"]["loramill"]["of_gemm"] for one in measured if not one["decode"] and one["rank"] >= 64]
    layers = [layer["alone_percent"] for layer in result["layers"] if layer["rank"] == 16]
    return [
        Target("decode (to 512 rows), of the copy bandwidth: at least 75%", 75, decode),
        Target("prefill at rank 64 and more, of the bf16 GEMM rate: at least 60%", 60, prefill),
        Target("LoRA of an 8B layer, 256 rows over 32 adapters, of its time: at most 6%", 6, layers, "{:.1f}%", True),
        Target("times vLLM's kernels: at least 1.3", 1.3, ratios(measured, ["vllm"]), "{:.2f}x"),
        Target("times SGLang's best: at least 1.1", 1.1, ratios(measured, ["sglang-16", "sglang-128"]), "{:.2f}x"),
    ]


def ratios(measured: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[float]:
    """How many times the speed of the best of `names` the product has, at each point where one of them ran."""
    found = []
    for one in measured:
        theirs = [seconds for name in names if (seconds := _seconds(one, name)) is not None]
        if theirs:
            found.append(min(theirs) / one["forms"]["loramill"]["seconds"]["median"])
    return found


def section(results: Sequence[Result]) -> str:
    """Everything under the heading: of each device what it has, or that there is nothing yet."""
    if not results:
        return NOT_MEASURED
    parts = {"kernels": kernels, "engine": engine, "peers": peers, "tests": tests}
    return "\n".join(parts[result["part"]](result) for result in results)


def kernels(result: Result) -> str:
    """Targets, plot and table of one device."""
    copy, gemm = result["ceilings"]["copy"] / 1e12, result["ceilings"]["gemm"] / 1e12
    lines = [
        f"### Kernels on {result['device']}",
        "",
        "| target | median (range) over points | reached at |",
        "|---|---|---|",
        *(target.row() for target in targets(result)),
        "",
        f"In the same run a copy moves {copy:.2f} TB/s and a bf16 GEMM does {gemm:.0f} TFLOP/s. {result['method']}",
        _source(result),
        "",
        f"![percent of what bounds each point]({plot_name(result)})",
        "",
        f"| µs (percent of the bound) | bound | MB | {' | '.join(result['titles'].values())} |",
        "|---" * (3 + len(result["titles"])) + "|",
    ]
    for one in result["points"]:
        cells = [_cell(one["forms"].get(name)) for name in result["titles"]]
        bound = next((found["bound"] for found in one["forms"].values() if "bound" in found), "")
        lines.append(f"| {one['name']} | {bound} | {one['bytes'] / 1e6:.1f} | {' | '.join(cells)} |")
    lines += ["", *(f"{name} is absent: {why}." for name, why in result["absent"].items())]
    for name in ("vllm", "sglang-16", "sglang-128"):
        found = ratios([one for one in result["points"] if _seconds(one, "loramill")], [name])
        if found:
            lines.append(f"Against {result['titles'][name]}: {geometric_mean(found):.2f}x, geometric mean.")
    lines += map(_layer, result["layers"])
    if result["skipped"]:
        lines.append(f"Time ran out before {len(result['skipped'])} points: {'; '.join(result['skipped'])}.")
    return "\n".join([*lines, ""])


def engine(result: Result) -> str:
    """LoRA against none, and the decode step against its floor, on one device."""
    runs = {name: one["run_s"] for name, one in result["runners"].items()}
    base, *others = runs.values() or [[]]
    steps = [one["of_floor"] for one in result["decode"] if one["name"] == "loramill-base"]
    largest = max((one["rows"] for one in result["decode"]), default=0)
    outside = [100 * one["outside"] for one in result["decode"] if one["rows"] == largest]
    dynamic = [100 * none / with_lora for run_s in others for none, with_lora in zip(base, run_s, strict=False)]
    rows = [
        Target("own dynamic, of own no-LoRA: at least 95%", 95, dynamic, "{:.1f}%"),
        Target("own no-LoRA decode step, times its floor: at most 1.35", 1.35, steps, "{:.2f}x", True),
        Target(f"a pass outside the forward, at {largest} rows: at most 5%", 5, outside, "{:.1f}%", True),
    ]
    copy, gemm = result["ceilings"]["copy"] / 1e12, result["ceilings"]["gemm"] / 1e12
    lines = [
        f"### The engine on {result['device']}",
        "",
        "| target | median (range) over rounds or points | reached at |",
        "|---|---|---|",
        *(target.row() for target in rows),
        "",
        "| | seconds, median (range) | output tokens/s |",
        "|---|---|---|",
    ]
    for name, one in result["runners"].items():
        low, mid, high = (f(runs[name]) for f in (min, median, max))
        rate = result["job"]["rows"] * result["job"]["output_tokens"] / mid
        lines.append(f"| {one['title']} | {mid:.2f} ({low:.2f} to {high:.2f}) | {rate:.0f} |")
    lines += [
        "",
        "| decode step | rows | ms | passes not overlapping, ms | floor, ms | times its floor | outside the forward |",
    ]
    lines += ["|---" * 7 + "|"]
    lines += [
        f"| {one['title']} | {one['rows']} | {one['step_s'] * 1e3:.2f} | {one['one_at_a_time_s'] * 1e3:.2f} | "
        f"{one['floor_s'] * 1e3:.2f} | {one['of_floor']:.2f} | {one['outside']:.1%} |"
        for one in result["decode"]
    ]
    said = f"{result['setting']} {len(base)} rounds, each runner in turn. A floor is the larger of weights + KV bytes "
    said += f"over the copy bandwidth, {copy:.2f} TB/s, and operations over the bf16 GEMM rate, {gemm:.0f} TFLOP/s."
    return "\n".join([*lines, "", said, _source(result), ""])


def peers(result: Result) -> str:
    """The job on one device, runner by runner."""
    rates = {name: one["output_tokens_per_s"] for name, one in result["runners"].items()}
    pairs = [("loramill-base", "transformers-continuous", 1.5), ("loramill-16", "peft-mixed", 10.0)]
    lines = [
        f"### The engine and its peers on {result['device']}",
        "",
        "| target | measured | reached at |",
        "|---|---|---|",
        *(
            Target(f"{one} / {other}: at least {least:g}", least, _ratio(rates, one, other), "{:.2f}x").row()
            for one, other, least in pairs
        ),
        "",
        "| | rows | output tokens/s | of our no LoRA |",
        "|---|---|---|---|",
    ]
    for name, one in result["runners"].items():
        share = f"{rates[name] / rates['loramill-base']:.0%}" if rates.get("loramill-base") else ""
        lines.append(f"| {one['title']} | {one['rows']} | {rates[name]:.0f} | {share} |")
    lines += [f"| {name} | | absent: {why} | |" for name, why in result["absent"].items()]
    return "\n".join([*lines, "", f"{result['setting']} One run each, after a warm-up.", _source(result), ""])


def _ratio(rates: Mapping[str, float], one: str, other: str) -> list[float]:
    return [rates[one] / rates[other]] if one in rates and other in rates else []


def tests(result: Result) -> str:
    """What ran on one device."""
    counts = ", ".join(f"{result[name]} {name}" for name in ("passed", "failed", "skipped"))
    return f"### Tests on {result['device']}\n\n{counts}. {_source(result)}\n"


def plot_name(result: Result) -> str:
    """The plot's file, beside the documents."""
    return f"{result['device'].lower().replace(' ', '-')}-kernels.svg"


def _seconds(one: Mapping[str, Any], name: str) -> float | None:
    found = one["forms"].get(name, {})
    return found["seconds"]["median"] if "seconds" in found else None


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if "seconds" in found:
        return f"{found['seconds']['median'] * 1e6:.1f} ({found['of_bound']:.0f}%)"
    if "wrong" in found:
        return f"wrong by {found['wrong']:.1e}"
    return "failed" if "failed" in found else "absent"


def _layer(layer: Mapping[str, Any]) -> str:
    micros = [f"{name.replace('_', ' ')} {took['median'] * 1e6:.0f}" for name, took in layer["seconds"].items()]
    return (
        f"One 8B layer of {layer['rows']} rows with {layer['adapters']} adapters of rank {layer['rank']}, "
        f"µs: {', '.join(micros)}; LoRA alone is {layer['alone_percent']:.1f}% of the base, and adds "
        f"{layer['added_percent']:.1f}%."
    )


def _source(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return f"{versions}; `{result['command']}`, {result['date']}."
