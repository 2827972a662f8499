"""Rows that begin alike meet, and the longest still come first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loramill.producer.plan import plan
from loramill.producer.prefixes import DEPTHS, beginnings, turns
from loramill.producer.waves import Limits, MixFacts


def order(prompts: Sequence[Sequence[int]], cost: Sequence[int], mix: Sequence[int] | None = None) -> list[int]:
    begins = np.array([beginnings(prompt) for prompt in prompts], np.int64)
    whole = np.array([hash(tuple(prompt)) for prompt in prompts], np.int64)
    of = np.array(mix or [0] * len(prompts), np.int32)
    return np.argsort(turns(of, np.array(cost, np.int64), begins, whole)).tolist()


def test_rows_that_begin_alike_are_together_and_the_longest_first() -> None:
    a, b = [1] * 300, [1] * 100 + [2] * 200
    prompts = [[5], [*a, 1], [6], [*b, 3], [*a, 4], [7], [*b, 5], [*a, 6]]
    # All four long ones have 16 and 64 tokens in common; then each has its own.
    assert order(prompts, [9, 3, 7, 8, 5, 1, 2, 4]) == [0, 3, 6, 4, 7, 1, 2, 5]
    assert order(prompts, [9, 3, 7, 8, 5, 1, 2, 4], [0, 0, 0, 1, 1, 0, 1, 0]) == [0, 3, 6, 4, 2, 7, 1, 5]


def test_without_anything_in_common_it_is_the_longest_first() -> None:
    prompts = [[number] * 20 for number in range(50)]
    cost = [number * 7 % 13 for number in range(50)]
    assert order(prompts, cost) == sorted(range(50), key=lambda row: -cost[row])


def test_a_beginning_is_compared_at_every_depth() -> None:
    keys = [beginnings([1] * depth + [2] * (2000 - depth)) for depth in (0, *DEPTHS, 2000)]
    assert len(set(keys)) == len(DEPTHS) + 1, "beyond the deepest nothing is compared"
    assert keys[-1] == keys[-2]
    assert max(keys) < 2**63
    apart = [(keys[-1] ^ key).bit_length() for key in keys]
    assert apart == sorted(apart, reverse=True)


rows = st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3), st.integers(0, 3), st.integers(1, 9)), max_size=40)


@given(rows)
def test_every_group_is_in_one_piece(drawn: list[tuple[int, int, int, int]]) -> None:
    prompts = [[first] * 16 + [second] * 48 + [number] for number, (_, first, second, _) in enumerate(drawn)]
    placed = order(prompts, [cost for *_, cost in drawn], [mix for mix, *_ in drawn])
    assert sorted(placed) == list(range(len(drawn)))
    for depth in (2, 3):
        met = [drawn[row][:depth] for row in placed]
        pieces = [group for at, group in enumerate(met) if not at or met[at - 1] != group]
        assert len(pieces) == len(set(pieces))


def test_a_plan_keeps_them_together() -> None:
    system = [[1] * 40, [2] * 40]
    prompts = [[*system[row % 2], row] for row in range(12)]
    mix = np.array([row // 2 % 3 - 1 for row in range(12)], np.int32)
    begins = np.array([beginnings(prompt) for prompt in prompts], np.int64)
    tokens = np.arange(12) + 41
    made = plan(mix, tokens, tokens, [MixFacts((n,), 8) for n in range(2)], Limits(2, 4, 64), begins=begins)
    met = [(int(mix[row]), int(row) % 2) for row in made.rows]
    assert len([1 for at, one in enumerate(met) if not at or met[at - 1] != one]) == 6
