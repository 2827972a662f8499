"""Spans of time, written and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.worker.durations import LONGEST_S, in_words, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("4h", 14400), ("1d", 86400), ("1.5h", 5400), (" 2 H ", 7200), ("0.2", 0.2)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "5 weeks", "-1", "0", "1e3", "nan", "4h30m", "99999d", "5mm"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.25, "250 ms"),
        (42, "42 s"),
        (310, "5 m 10 s"),
        (300, "5 m"),
        (15600, "4 h 20 m"),
        (86401, "1 d"),
        (-1, "0 ms"),
    ],
)
def test_durations_are_said(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@given(st.floats(0.001, LONGEST_S))
def test_every_duration_can_be_said(seconds: float) -> None:
    assert in_words(seconds)
