"""The simulation's section of the documents, from bench/results/simulation-*.json. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]

MEASURES = (("makespan_s", "makespan"), ("idle_share", "idle places"), ("loads", "adapter loads"), ("reads", "reads"))


def section(results: Sequence[Result]) -> str:
    """Every simulation: job, table, plot, where its constants come from."""
    return "\n".join(map(_one, results))


def plot_name(result: Result) -> str:
    """The plot's file, beside the documents."""
    return f"{result['name']}.svg"


def points(result: Result) -> list[dict[str, Any]]:
    """What `bench.plot` draws: each measure of each strategy in percent of the largest."""
    found = []
    for key, title in MEASURES:
        most = max(run[key] for run in result["runs"].values()) or 1
        forms = {name: {"of_bound": 100 * run[key] / most} for name, run in result["runs"].items()}
        found.append({"name": f"{title}, percent of the largest", "forms": forms})
    return found


def _one(result: Result) -> str:
    spec, costs, runs = result["spec"], result["costs"], result["runs"]
    hardware = result["hardware"]
    lines = [
        f"**A simulation: no model ran.** {spec['rows']:,} shuffled rows over {spec['adapters']:,} adapters "
        f"({result['adapters_named']:,} of them named; Zipf {spec['zipf']:g}, {spec['base_share']:.0%} of rows for the "
        f"base), {_range(spec['prompt_tokens'])} prompt tokens, max_tokens {_range(spec['max_tokens'])} of which "
        f"answers have {spec['answered'][0]:.0%} to {spec['answered'][1]:.0%}; {spec['workers']} workers of "
        f"{spec['slots']} slots and {spec['max_num_seqs']} rows at once, host memory for {spec['host']:,} "
        f"adapters each, shards of about {spec['shard_rows']} rows, {result['look_ahead']} rows in sight of a worker.",
        "",
        "| | makespan | output tokens/s | idle places | adapter loads | swaps (evictions) | reads from disk |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {result['titles'][name]} | {run['makespan_s']:,.0f} s | {run['output_tokens_per_s']:,.0f} | "
            f"{run['idle_share']:.1%} | {run['loads']:,} | {run['swaps']:,} | {run['reads']:,} |"
            for name, run in runs.items()
        ),
        "",
        f"![the strategies compared]({plot_name(result)})",
        "",
        "Idle places are those of the workers' batches that held no row, over the makespan. The constants are fitted "
        f"to {result['source']}: a prompt token {costs['prefill_s_per_token'] * 1e3:.2f} ms, a decode pass "
        f"{costs['decode_s_per_pass'] * 1e3:.1f} ms and {costs['decode_s_per_row'] * 1e3:.2f} ms a row; with LoRA "
        f"{costs['lora_s_per_pass'] * 1e3:.1f} ms a pass, {costs['lora_s_per_row'] * 1e3:.2f} ms a row and "
        f"{costs['lora_s_per_adapter'] * 1e3:.1f} ms an adapter more (its share of a prompt was not timed, and is left "
        f"out). Planning took {result['plan_cpu_s']:.1f} s of CPU, the simulation "
        f"{sum(run['cpu_s'] for run in runs.values()):.0f} s, on {hardware['cores']} cores of {hardware['cpu']}; "
        f"`{result['command']}`, {result['date']}.",
        "",
    ]
    return "\n".join(lines)


def _range(limits: Sequence[int]) -> str:
    return f"{limits[0]} to {limits[1] - 1}"
