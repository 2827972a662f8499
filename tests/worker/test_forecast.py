"""What is known of the rows to come, held against looking for it row by row."""

from __future__ import annotations

from math import inf

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loramill.worker.forecast import Forecast

ADAPTERS = [("a",), ("b",), ("a", "c"), ("d",)]


@given(st.lists(st.integers(-1, len(ADAPTERS) - 1), max_size=30), st.lists(st.integers(1, 9), max_size=12))
def test_it_looks_as_far_as_the_rows_reach(order: list[int], taken: list[int]) -> None:
    forecast = Forecast(np.array(order, np.int32), ADAPTERS)
    left = order
    for rows in [0, *taken]:
        forecast.take(rows)
        left = left[rows:]
        for adapter in "abcde":
            distances = [at for at, mix in enumerate(left) if mix >= 0 and adapter in ADAPTERS[mix]]
            assert forecast.next_use(adapter) == (distances[0] if distances else inf)
        changes = [mix for at, mix in enumerate(left) if mix >= 0 and (at == 0 or left[at - 1] != mix)]
        assert list(forecast.coming()) == [adapter for mix in changes for adapter in ADAPTERS[mix]]
