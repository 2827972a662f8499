"""Pure arithmetic of the benchmark: agreement of tokens, medians, ratios round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median

Tokens = Mapping[str, Sequence[int]]
"""Output token ids by `custom_id`."""

BASE = "loramill-base"
OURS = ("loramill", "loramill-8", "loramill-16", "loramill-static", "loramill-auto")
"""Names of loramill's runners, without and with LoRA."""


class TokensError(Exception):
    """A runner did not answer what was asked, so its time means nothing."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some repeats and how far they lie apart."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def check_counts(name: str, tokens: Tokens, ids: Sequence[str], each: int | Sequence[int]) -> None:
    """Raise `TokensError` unless `tokens` has exactly `ids`, with `each` tokens for every one, or for each its own."""
    missing, unasked = set(ids) - set(tokens), set(tokens) - set(ids)
    if missing or unasked:
        raise TokensError(f"{name}: {len(missing)} rows are missing and {len(unasked)} were not asked for")
    counts = [each] * len(ids) if isinstance(each, int) else each
    wrong = [(row, count) for row, count in zip(ids, counts, strict=True) if len(tokens[row]) != count]
    if wrong:
        row, count = wrong[0]
        raise TokensError(f"{name}: {len(wrong)} rows have another count; {row} has {len(tokens[row])}, not {count}")


def agreement(tokens: Tokens, reference: Tokens) -> dict[str, float]:
    """Fraction of rows that are identical, of tokens before each row's first difference, and of equal first tokens."""
    same_rows = same_tokens = same_first = total = 0
    for row, expected in reference.items():
        pairs = zip(tokens[row], expected, strict=True)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        same_rows += same == len(expected)
        same_tokens += same
        same_first += same > 0
        total += len(expected)
    return {"rows": same_rows / len(reference), "tokens": same_tokens / total, "first": same_first / len(reference)}


def check_agreement(name: str, found: Mapping[str, float]) -> None:
    """Raise `TokensError` unless half of the first tokens agree: rounding parts later ones, these only at near ties."""
    if found["first"] < 0.5:
        raise TokensError(
            f"{name}: only {found['first']:.0%} of first tokens are the reference's: another model answered"
        )


def ratio(seconds: Mapping[str, Sequence[float]], first: str, second: str) -> list[float]:
    """How many times the rate of `second` the rate of `first` is, one per round: rounds are paired, so that drift of
    the machine cancels. Empty unless both ran."""
    return [theirs / mine for mine, theirs in zip(seconds.get(first, ()), seconds.get(second, ()), strict=False)]


def best(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> str | None:
    """Of `names`, the one that ran with the least median; None if none ran."""
    return min((name for name in names if seconds.get(name)), key=lambda name: median(seconds[name]), default=None)


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each runner against loramill without LoRA, and loramill's best with LoRA against each, one ratio per round."""
    ours = best(seconds, OURS)
    pairs = [(name, BASE) for name in seconds if name != BASE]
    pairs += [(ours, name) for name in seconds if ours and name not in (ours, BASE)]
    return {f"{one} / {other}": found for one, other in pairs if (found := ratio(seconds, one, other))}
