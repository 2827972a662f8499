"""The documents' sections of `python -m bench` and `python -m bench.engine_time`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures import BASE, OURS, best, ratio, spread
from bench.named import POINTS
from bench.plot import Bar, bars
from bench.targets import HEAD, judge

Result = Mapping[str, Any]
GROWTH = "growth-"
"""How the points begin that are one table together."""


def summary(results: Sequence[Result]) -> str:
    """The main point: one table and its setting."""
    return "\n".join(f"{table(result)}\n\n{setting(result)}\n" for result in results if result["name"] == "main")


def section(results: Sequence[Result]) -> str:
    """Every point: the main one with all that is known of it, then the others, then growth."""
    points = [one for one in _in_order(results) if not one["name"].startswith(GROWTH)]
    return "\n".join(detail(one) if one["name"] == "main" else brief(one) for one in points) + _growth(results)


def targets(results: Sequence[Result]) -> str:
    """Each target with what was found."""
    return "\n".join([HEAD, *(one.row() for one in judge(results)), ""])


def engine_time(results: Sequence[Result]) -> str:
    """What a pass takes outside the forward pass."""
    return "\n".join(map(_engine_time, results)) or "Not measured.\n"


def plots(results: Sequence[Result]) -> dict[str, str]:
    """File name -> SVG: rates of each point, and seconds of a row as jobs grow."""
    made = {}
    for result in results:
        if not result["name"].startswith(GROWTH):
            found = [
                Bar(one["title"], rate["low"], rate["median"], rate["high"], name.startswith("loramill"))
                for name, one in result["runners"].items()
                for rate in [one["output_tokens_per_s"]]
            ]
            made[plot_name(result)] = bars(f"{_about(result)}: output tokens/s, median and range", found)
    if grown := _grown(results):
        rows = [(f"{one['job']['rows']:,} rows", spread(_row_us(one))) for one in grown]
        found = [Bar(name, one.low, one.median, one.high) for name, one in rows]
        made["bench-growth.svg"] = bars("microseconds of a row, median and range", found)
    return made


def plot_name(result: Result) -> str:
    return f"bench-{result['name']}.svg"


def table(result: Result) -> str:
    """One row per runner: rates with their range, against ours without LoRA, and how our best with LoRA compares."""
    seconds = {name: runner["run_s"] for name, runner in result["runners"].items()}
    ours = best(seconds, OURS)
    title = result["runners"][ours]["title"] if ours else "loramill with LoRA"
    lines = [f"| | output tokens/s, median (range) | of loramill, no LoRA | {title}, is |", "|---|---|---|---|"]
    for name, runner in result["runners"].items():
        share = "" if name == BASE else _spread(ratio(seconds, name, BASE), ".0%")
        times = _spread(ratio(seconds, ours, name), ".2f", "x") if ours and name != ours else ""
        lines.append(f"| {runner['title']} | {_range(runner['output_tokens_per_s'], '.0f')} | {share} | {times} |")
    lines += [f"| {name} | absent: {reason} | | |" for name, reason in result["absent"].items()]
    return "\n".join(lines)


def setting(result: Result) -> str:
    """Job and machine in one paragraph."""
    hardware = result["hardware"]
    flags = f" ({', '.join(hardware['bf16'])})" if hardware["bf16"] else ""
    rounds = max((len(runner["run_s"]) for runner in result["runners"].values()), default=0)
    return (
        f"{_job(result['job'])}; {hardware['cores']} cores of {hardware['cpu']}{flags}, "
        f"{hardware['memory_gib']:g} GiB; {rounds} interleaved rounds, {result['date']}."
    )


def brief(result: Result) -> str:
    """A point that is not the main one."""
    return "\n".join(
        [
            f"### {_about(result)} (`{result['name']}`)",
            "",
            table(result),
            "",
            f"{setting(result)} {_checked(result)}",
            "",
        ]
    )


def detail(result: Result) -> str:
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
    details = {runner["title"]: runner["details"] for runner in result["runners"].values()}
    set_up = [f"{title}: {', '.join(_flat(one))}." for title, one in details.items() if "command" not in one and one]
    commands = [one["command"] for one in details.values() if "command" in one]
    return "\n".join(
        [
            f"### {_about(result)} (`{result['name']}`)",
            "",
            f"![output tokens/s]({plot_name(result)})",
            "",
            table(result),
            "",
            setting(result),
            f"Shape: {shape}. {versions}; {result['hardware']['threads']} threads for each. {_noise(result)}",
            "Ratios are medians (ranges) of the rounds' own ratios. Loading the model is not timed; loramill's time "
            "includes loading and evicting adapters, PEFT's adapters are all loaded beforehand.",
            *set_up,
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


def _growth(results: Sequence[Result]) -> str:
    grown = _grown(results)
    if not grown:
        return ""
    lines = ["### Growth", "", "| rows | microseconds of a row | rows/s | most memory |", "|---|---|---|---|"]
    for result in grown:
        us, memory = _row_us(result), [peak / 2**20 for peak in result["runners"]["loramill"]["peak_bytes"]]
        rates = [1e6 / one for one in us]
        cells = [
            f"{result['job']['rows']:,}",
            _spread(us, ",.0f"),
            _spread(rates, ",.0f"),
            _spread(memory, ",.0f", " MiB"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        ["", *lines, "", "![microseconds of a row](bench-growth.svg)", "", f"The tiny model: {setting(grown[-1])}", ""]
    )


def _engine_time(result: Result) -> str:
    lines = ["| pass of 256 rows | ms | of them outside the forward pass | share |", "|---|---|---|---|"]
    for one in result["passes"].values():
        ms = ({key: 1e3 * value for key, value in one[name].items()} for name in ("pass_s", "outside_s"))
        cells = [*(_range(values, ".2f") for values in ms), _range(one["outside"], ".1%")]
        lines.append(f"| {one['title']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Decoding, {made_by(result)}", ""])


def made_by(result: Result) -> str:
    """Job, machine, date and command of a part."""
    hardware = result["hardware"]
    return (
        f"{_job(result['job'])}. {hardware['cores']} cores of {hardware['cpu']}, torch "
        f"{result['versions']['torch']}; {result['date']}; `{result['command']}`."
    )


def _grown(results: Sequence[Result]) -> list[Result]:
    return [one for one in _in_order(results) if one["name"].startswith(GROWTH) and "loramill" in one["runners"]]


def _row_us(result: Result) -> list[float]:
    return [1e6 * seconds / result["job"]["rows"] for seconds in result["runners"]["loramill"]["run_s"]]


def _in_order(results: Sequence[Result]) -> list[Result]:
    """As the points are listed; what is not among them is no point any more."""
    by_name = {result["name"]: result for result in results}
    return [by_name[name] for name in POINTS if name in by_name]


def _about(result: Result) -> str:
    point = POINTS.get(result["name"])
    about = point.about if point else result["name"]
    return about[:1].upper() + about[1:]


def _job(job: Mapping[str, Any]) -> str:
    """Rows, lengths, adapters and model in words."""
    least = job.get("least_rank")
    rank = f"ranks {least} to {job['rank']}" if least else f"rank {job['rank']}"
    lengths = [_length(job, which) for which in ("prompt", "output")]
    shared = f", {job['shared_tokens']} of them its adapter's" if job.get("shared_tokens") else ""
    tiny = job.get("tiny")
    many = f"{job['adapters']} adapters (Zipf {job['zipf']:g}" if job["adapters"] > 1 else "1 adapter ("
    kind = "" if tiny else f"; {rank} on {job['targets']}" if job["adapters"] > 1 else f"{rank} on {job['targets']}"
    model = (
        "the trained model of examples/tiny"
        if tiny
        else f"a random Qwen2 shape of {job['parameters'] / 1e6:.1f}M parameters"
    )
    return (
        f"{job['rows']:,} rows over {many}{kind}), {lengths[0]} prompt{shared} + {lengths[1]} output tokens a row; "
        f"{model} in {job['dtype']}"
    )


def _length(job: Mapping[str, Any], which: str) -> str:
    least, most = job.get(f"least_{which}_tokens"), job[f"{which}_tokens"]
    return f"{least} to {most:,}" if least else f"{most:,}"


def _checked(result: Result) -> str:
    same = [
        f"{one['title']} {one['agreement']['tokens']:.0%}" for one in result["runners"].values() if one["agreement"]
    ]
    agreed = f"Greedy tokens before a difference from the reference: {', '.join(same)}." if same else ""
    return " ".join(part for part in (agreed, _noise(result), f"`{result['command']}`.") if part)


def _noise(result: Result) -> str:
    others = [value for runner in result["runners"].values() for value in runner["others_cores"]]
    return f"Other processes kept at most {max(others):.2f} cores busy during a run." if others else ""


def _flat(details: Mapping[str, Any]) -> list[str]:
    return [f"{key} {' '.join(map(str, one)) if isinstance(one, list) else one}" for key, one in details.items()]


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    if not values:
        return ""
    found = spread(values)
    return f"{found.median:{form}} ({found.low:{form}}-{found.high:{form}}){unit}"


def _range(values: Mapping[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['low']:{form}}-{values['high']:{form}})"
