"""Tokens a second over time, as the paths of an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loramill.producer.api.throughput import Sample

BINS = 60
"""Looks alone would jump, since workers commit rows many at a time."""
SPANS_S = (300, 900, 1800, 3600)
"""The chart is as wide as what there is to show, up to an hour."""
WIDTH, HEIGHT = 960, 160
_MEANS = 12
_NOW_S = 30.0
"""What counts as now."""


@dataclass(slots=True, frozen=True)
class Rate:
    """Tokens a second."""

    prompt: float
    completion: float

    @property
    def both(self) -> float:
        """Of them."""
        return self.prompt + self.completion


@dataclass(slots=True, frozen=True)
class Chart:
    """What the template draws: completion tokens at the bottom, prompt tokens on top of them."""

    completion: str
    """The path of an area."""
    both: str
    line: str
    """The upper edge of both."""
    top: int
    """Tokens a second at the upper end."""
    now: Rate
    peak: float
    rows: tuple[tuple[int, Rate | None], ...]
    """(seconds ago, the mean from then back to the next), the latest first: the same for those who do not see it."""
    span_s: int

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed in that time."""
        return self.peak == 0


def chart(samples: Sequence[Sample], now_s: float) -> Chart:
    """Of the last hour's samples, the oldest first."""
    age_s = now_s - samples[0].at_s if samples else 0.0
    span_s = next((span_s for span_s in SPANS_S if age_s <= span_s), SPANS_S[-1])
    rates = binned(samples, now_s, span_s, BINS)
    peak = max((rate.both for rate in rates if rate), default=0.0)
    top = nice(peak)
    both = [rate.both / top if rate else None for rate in rates]
    means = binned(samples, now_s, span_s, _MEANS)
    return Chart(
        completion=" ".join(_areas([rate.completion / top if rate else None for rate in rates])),
        both=" ".join(_areas(both)),
        line=" ".join(_lines(both)),
        top=top,
        now=mean([sample for sample in samples if sample.at_s > now_s - _NOW_S]) or Rate(0, 0),
        peak=peak,
        rows=tuple((at * span_s // _MEANS, rate) for at, rate in enumerate(reversed(means))),
        span_s=span_s,
    )


def binned(samples: Sequence[Sample], now_s: float, span_s: float, bins: int) -> list[Rate | None]:
    """The means of the last `span_s` in so many equal parts; None where nobody looked."""
    parts: list[list[Sample]] = [[] for _ in range(bins)]
    for sample in samples:
        at = math.floor((sample.at_s - (now_s - span_s)) / span_s * bins)
        # What was seen this very moment belongs to the last part.
        if 0 <= at <= bins:
            parts[min(at, bins - 1)].append(sample)
    return [mean(part) for part in parts]


def mean(samples: Sequence[Sample]) -> Rate | None:
    """None of no samples."""
    spent_s = sum(sample.spent_s for sample in samples)
    if not spent_s:
        return None
    prompt = sum(sample.tokens.prompt for sample in samples)
    return Rate(prompt / spent_s, sum(sample.tokens.completion for sample in samples) / spent_s)


def nice(peak: float) -> int:
    """The least of 10, 20, 40, 100, 200, 400, 1000 ... that is no less: half of it is a round number too."""
    top, factors = 10, (2, 2, 2.5)
    at = 0
    while top < peak:
        top = round(top * factors[at % 3])
        at += 1
    return top


def _runs(values: Sequence[float | None]) -> Iterator[list[tuple[float, float]]]:
    """The points of each stretch without a gap."""
    run: list[tuple[float, float]] = []
    for at, value in enumerate(values):
        if value is not None:
            run.append(((at + 0.5) * WIDTH / len(values), HEIGHT - value * (HEIGHT - 2)))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _lines(values: Sequence[float | None]) -> Iterator[str]:
    for run in _runs(values):
        yield "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) + ("h.1" if len(run) == 1 else "")


def _areas(values: Sequence[float | None]) -> Iterator[str]:
    for run in _runs(values):
        points = "L".join(f"{x:.1f} {y:.1f}" for x, y in run)
        yield f"M{run[0][0]:.1f} {HEIGHT}L{points}L{run[-1][0]:.1f} {HEIGHT}Z"
