"""Sequences that wait: their order is that of a plain list, however they come and go."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from loramill.worker.request import Request, Sampling, plain
from loramill.worker.sequence import Sequence
from loramill.worker.waiting import Waiting, kind_of


@given(st.randoms(use_true_random=False))
def test_the_order_is_that_of_a_list(draw: Random) -> None:
    waiting = Waiting()
    urgent, common = list[Sequence](), list[Sequence]()
    for key in range(draw.randint(0, 40)):
        if draw.random() < 0.3 and urgent + common:
            one = draw.choice(urgent + common)
            waiting.remove(one)
            (urgent if one.request.urgent else common).remove(one)
            continue
        mix = plain(draw.choice([None, "a", "b"]))
        is_urgent, merged, first = (draw.random() < 0.3 for _ in range(3))
        request = Request(key // 2, [1], Sampling(1), mix, merged and bool(mix), urgent=is_urgent)
        one = Sequence(request, 0, [1])
        waiting.add(one, first=first)
        lane = urgent if is_urgent else common
        lane.insert(0 if first else len(lane), one)
    if common and draw.random() < 0.5:
        waiting.favoured = common[0]
        common, urgent = common[1:], [common[0], *urgent]
    every = urgent + common
    assert list(waiting) == every
    assert len(waiting) == len(every)
    assert waiting.first is (every[0] if every else None)
    assert waiting.first_common is next((one for one in every if not one.request.urgent), None)
    assert waiting.urgent == ([] if waiting.favoured else urgent)
    heads = {kind_of(one): one for one in reversed(every)}
    assert {kind_of(one): one for _, one in waiting.heads()} == heads
    asked = [adapter for one in every if not one.request.merged for adapter, _ in one.request.mix]
    assert list(waiting.wanted) == list(dict.fromkeys(asked))
    assert set(waiting.adapters) == set(asked)
    for weights in ((), plain("a"), plain("b")):
        assert waiting.any_with(weights) == any(one.weights == weights for one in every)
    for key in range(20):
        assert set(waiting.of_row(key)) == {one for one in every if one.request.key == key}
