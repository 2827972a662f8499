"""Pure arithmetic of the benchmark: agreement of tokens, medians, ratios round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median

Tokens = Mapping[str, Sequence[int]]
"""Output token ids by `custom_id`."""

RATIOS = (
    ("loramill", "peft-mixed"),
    ("loramill", "peft-grouped"),
    ("loramill", "loramill-base"),
    ("loramill-16", "peft-mixed"),
    ("loramill-16", "peft-grouped"),
    ("loramill-16", "loramill-base"),
    ("loramill-base", "transformers"),
)
"""Pairs whose rates are compared: how many times the second's rate the first has."""


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


def check_counts(name: str, tokens: Tokens, ids: Sequence[str], each: int) -> None:
    """Raise `TokensError` unless `tokens` has exactly `ids`, with `each` tokens for every one."""
    missing, unasked = set(ids) - set(tokens), set(tokens) - set(ids)
    if missing or unasked:
        raise TokensError(f"{name}: {len(missing)} rows are missing and {len(unasked)} were not asked for")
    wrong = [row for row in ids if len(tokens[row]) != each]
    if wrong:
        raise TokensError(f"{name}: {len(wrong)} rows have not {each} tokens; {wrong[0]} has {len(tokens[wrong[0]])}")


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


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Rate ratios of `RATIOS` where both ran, one per round: rounds are paired, so drift of the machine cancels."""
    return {
        f"{ours} / {peer}": [theirs / mine for mine, theirs in zip(seconds[ours], seconds[peer], strict=True)]
        for ours, peer in RATIOS
        if seconds.get(ours) and seconds.get(peer)
    }
