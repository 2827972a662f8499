"""The benchmark's arithmetic: how rows are shared out, which tokens count, which ratio is reported."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.figures import TokensError, agreement, best, check_agreement, check_counts, ratio, ratios, spread
from bench.job import Spec, make_rows, zipf_counts


@given(rows=st.integers(0, 500), adapters=st.integers(1, 64), exponent=st.floats(0, 3))
def test_zipf_counts_sum_to_the_rows_and_never_rise(rows: int, adapters: int, exponent: float) -> None:
    counts = zipf_counts(rows, adapters, exponent)
    assert sum(counts) == rows
    assert len(counts) == adapters
    assert min(counts) >= 0
    assert counts == sorted(counts, reverse=True)


def test_zipf_counts_of_the_default_job() -> None:
    assert zipf_counts(128, 16, 1.0) == [38, 19, 13, 9, 8, 6, 5, 5, 4, 4, 3, 3, 3, 3, 3, 2]


def test_rows_are_the_same_every_time_and_shuffled() -> None:
    spec = Spec()
    rows = make_rows(spec)
    assert rows == make_rows(spec)
    names = [row.adapter for row in rows]
    assert names != sorted(names)
    assert {len(row.prompt) for row in rows} == {147}
    assert max(max(row.prompt) for row in rows) < spec.vocab


@given(
    least=st.integers(0, 12),
    more=st.integers(0, 20),
    shared=st.integers(0, 6),
    outputs=st.integers(0, 5),
    tiny=st.booleans(),
)
def test_rows_have_the_lengths_that_were_asked_for(
    least: int, more: int, shared: int, outputs: int, tiny: bool
) -> None:
    spec = Spec(
        rows=40, adapters=5, prompt_tokens=12 + more, least_prompt_tokens=least and min(least + shared, 12 + more),
        shared_tokens=shared, output_tokens=outputs + 3, least_output_tokens=outputs, tiny=tiny,
    )  # fmt: skip
    rows = make_rows(spec)
    assert all((spec.least_prompt_tokens or 12 + more) <= len(row.prompt) <= 12 + more for row in rows)
    assert all((outputs or 3) <= row.output_tokens <= outputs + 3 for row in rows)
    begins = {row.adapter: row.prompt[:shared] for row in rows}
    assert all(row.prompt[:shared] == begins[row.adapter] for row in rows)
    assert max(max(row.prompt) for row in rows) < (256 if tiny else spec.vocab)


def test_mixed_ranks_double_from_the_least_to_the_most() -> None:
    assert Spec(adapters=6, rank=64, least_rank=8).ranks() == [8, 16, 32, 64, 8, 16]
    assert Spec(adapters=3).ranks() == [16, 16, 16]


def test_the_default_shape_has_about_a_hundred_million_parameters() -> None:
    assert Spec().parameters() == 100_663_296


def test_ratios_are_paired_by_round() -> None:
    seconds = {"loramill": [2.0, 4.0], "peft-mixed": [8.0, 12.0], "loramill-base": [1.0, 3.0]}
    assert ratio(seconds, "loramill", "peft-mixed") == [4.0, 3.0]
    assert ratio(seconds, "loramill", "vllm") == []
    assert ratios(seconds) == {
        "loramill / loramill-base": [0.5, 0.75],
        "peft-mixed / loramill-base": [0.125, 0.25],
        "loramill / peft-mixed": [4.0, 3.0],
    }


def test_our_best_is_compared_with_the_others() -> None:
    seconds = {"loramill": [2.0, 4.0], "loramill-16": [1.0, 3.0], "peft-mixed": [8.0, 12.0]}
    assert best(seconds, ["loramill", "loramill-16", "loramill-auto"]) == "loramill-16"
    assert best(seconds, ["vllm"]) is None
    assert set(ratios(seconds)) == {"loramill-16 / loramill", "loramill-16 / peft-mixed"}


def test_spread_of_an_even_number_of_repeats() -> None:
    found = spread([4.0, 1.0, 2.0, 3.0])
    assert (found.median, found.low, found.high) == (2.5, 1.0, 4.0)


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    reference = {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8]}
    assert agreement(reference, reference) == {"rows": 1.0, "tokens": 1.0, "first": 1.0}
    later = {"a": [1, 2, 3, 4], "b": [5, 0, 7, 8]}
    assert agreement(later, reference) == {"rows": 0.5, "tokens": 5 / 8, "first": 1.0}


def test_a_runner_whose_first_tokens_are_others_is_refused() -> None:
    reference = {row: [1, 2] for row in "abc"}
    answers = {"a": [1, 2], "b": [9, 2], "c": [9, 2]}
    with pytest.raises(TokensError, match="another model answered"):
        check_agreement("peer", agreement(answers, reference))
    check_agreement("peer", agreement({**answers, "b": [1, 9]}, reference))


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ({"a": [1, 2]}, "1 rows are missing"),
        ({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, "1 were not asked for"),
        ({"a": [1, 2], "b": [1]}, "b has 1, not 2"),
    ],
)
def test_answers_with_other_rows_or_counts_are_refused(tokens: dict[str, list[int]], says: str) -> None:
    with pytest.raises(TokensError, match=says):
        check_counts("peer", tokens, ["a", "b"], 2)


def test_each_row_has_its_own_count() -> None:
    check_counts("peer", {"a": [1, 2], "b": [1]}, ["a", "b"], [2, 1])
    with pytest.raises(TokensError, match="b has 2, not 1"):
        check_counts("peer", {"a": [1, 2], "b": [1, 2]}, ["a", "b"], [2, 1])
