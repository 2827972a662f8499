"""What was asked of the speed on a CPU, as data, and what the results say to it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import BASE, OURS, best, ratio, spread

Result = Mapping[str, Any]
Results = Mapping[str, Result]
"""By name: of a point, or of a part."""
Found = tuple[list[float], str]
"""A value for each round, and what was compared with what."""

PEFT = ("peft-mixed", "peft-grouped")
VLLM_LORA = ("vllm-4", "vllm-8", "vllm-16")


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a figure that some rounds gave."""

    on: str
    what: str
    bound: float
    find: Callable[[Results], Found | None]
    at_most: bool = False
    percent: bool = False


def rates(point: str, ours: Sequence[str], theirs: Sequence[str]) -> Callable[[Results], Found | None]:
    """The rate of the best of `ours` over that of the best of `theirs`, round by round."""

    def find(results: Results) -> Found | None:
        runners = results.get(point, {}).get("runners", {})
        seconds = {name: one["run_s"] for name, one in runners.items()}
        first, second = best(seconds, ours), best(seconds, theirs)
        if not first or not second:
            return None
        return ratio(seconds, first, second), f"{runners[first]['title']} / {runners[second]['title']}"

    return find


def growth(of: Callable[[Result], list[float]]) -> Callable[[Results], Found | None]:
    """A figure of 100,000 rows over that of 1,000."""

    def find(results: Results) -> Found | None:
        few, many = results.get("growth-1000"), results.get("growth-100000")
        if not few or not many:
            return None
        return [last / first for first, last in zip(of(few), of(many), strict=False)], "100,000 rows / 1,000 rows"

    return find


def row_seconds(result: Result) -> list[float]:
    return [seconds / result["job"]["rows"] for seconds in result["runners"]["loramill"]["run_s"]]


def row_bytes(result: Result) -> list[float]:
    return list(map(float, result["runners"]["loramill"]["peak_bytes"]))


def outside(results: Results) -> Found | None:
    """The share of a pass spent outside the forward pass, one value for each kind of pass."""
    found = results.get("engine-time")
    if not found:
        return None
    shares = {one["title"]: one["outside"]["median"] for one in found["passes"].values()}
    return list(shares.values()), ", ".join(f"{title} {share:.1%}" for title, share in shares.items())


MAIN = "100M shape, 16 Zipf adapters, 128 rows (147 + 64)"
TARGETS = (
    Target(MAIN, "no LoRA / vLLM CPU no LoRA", 1.0, rates("main", [BASE], ["vllm"])),
    Target(MAIN, "16 adapters / no LoRA", 0.95, rates("main", OURS, [BASE])),
    Target(MAIN, "16 adapters / vLLM CPU with LoRA", 8.0, rates("main", OURS, VLLM_LORA)),
    Target(MAIN, "16 adapters / best PEFT arrangement", 4.5, rates("main", OURS, PEFT)),
    Target("2,000 rows, 8 adapters", "auto / no LoRA", 0.98, rates("auto-2000", ["loramill-auto"], [BASE])),
    Target(
        "1,000 rows, a 300-token system prompt for each adapter",
        "with / without prefix sharing",
        2.5,
        rates("shared-prompt", ["loramill"], ["loramill-unshared"]),
    ),
    Target("batch of 256", "engine time outside the forward pass", 0.05, outside, at_most=True, percent=True),
    Target("1,000 to 100,000 rows", "time for a row", 1.05, growth(row_seconds), at_most=True),
    Target("1,000 to 100,000 rows", "most memory", 1.05, growth(row_bytes), at_most=True),
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A target and what was found."""

    target: Target
    found: Found | None

    @property
    def verdict(self) -> str:
        if not self.found:
            return "not measured"
        values, bound = spread(self.found[0]), self.target.bound
        if (values.median <= bound) if self.target.at_most else (values.median >= bound):
            return "met"
        return "met within the spread" if values.low <= bound <= values.high else "missed"

    def row(self) -> str:
        """Of the table under `HEAD`."""
        target = self.target
        sign = "at most" if target.at_most else "at least"
        cells = [target.on, target.what, f"{sign} {self._form(target.bound)}", "", "", self.verdict]
        if self.found:
            values, compared = self.found
            low, median, high = (self._form(one) for one in (min(values), spread(values).median, max(values)))
            cells[3:5] = [f"{median} ({low}-{high})", f"{compared}; {len(values)} values"]
        return f"| {' | '.join(cells)} |"

    def _form(self, value: float) -> str:
        return f"{value:.1%}" if self.target.percent else f"{value:.2f}x"


HEAD = "| on | what | asked | found, median (range) | compared | |\n|---|---|---|---|---|---|"


def judge(results: Sequence[Result]) -> list[Judged]:
    """Every target, by results of points and parts."""
    by_name = {result.get("name") or result.get("part", ""): result for result in results}
    return [Judged(target, target.find(by_name)) for target in TARGETS]
