"""When a lease is renewed, and until when it may be used."""

from __future__ import annotations

import pytest

from loramill.store.records import Claim, Lease, Verdict
from loramill.worker.leases import Held
from loramill.worker.stopwatch import MAX_LOOK_S, Stopwatch


class Engine:
    progress: int | None = 5


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def held(engine: Engine) -> Held:
    return Held(Claim(Lease("j", 0, 1, 1, 30.0), 4, (), b""), 100.0, lambda: engine.progress)


def test_it_lasts_from_before_it_was_asked_for(held: Held) -> None:
    assert held.until_s == 130.0
    held.heard(held.lease, Verdict.HELD, 112.0, renewed=True)
    assert held.until_s == 142.0


def test_it_is_renewed_in_time_and_only_while_the_engine_steps(held: Held, engine: Engine) -> None:
    assert not held.due(115.0)  # nothing has stepped since the claim
    engine.progress = 6
    assert not held.due(109.9)
    assert held.due(110.0)
    held.heard(held.lease, Verdict.HELD, 110.0, renewed=True)
    assert not held.due(129.0)
    engine.progress = 7
    assert held.due(129.0)


def test_what_only_waits_for_the_store_is_renewed(held: Held, engine: Engine) -> None:
    engine.progress = None
    held.heard(held.lease, Verdict.HELD, 110.0, renewed=True)
    assert held.due(120.0)


@pytest.mark.parametrize(
    ("verdict", "renewed", "until_s"),
    [(Verdict.FENCED, True, 130.0), (Verdict.OVER, False, 130.0), (Verdict.OVER, True, 150.0)],
)
def test_verdicts(verdict: Verdict, renewed: bool, until_s: float, held: Held) -> None:
    held.heard(held.lease, verdict, 120.0, renewed)
    assert (held.verdict, held.until_s) == (verdict, until_s)


def test_word_of_a_lease_that_was_replaced_counts_for_nothing(held: Held) -> None:
    old = held.lease
    held.take(Lease("j", 0, 1, 2, 30.0), 140.0)
    held.heard(old, Verdict.FENCED, 141.0, renewed=True)
    assert (held.verdict, held.until_s) == (Verdict.HELD, 170.0)


def test_a_stopwatch_counts_what_was_looked_at() -> None:
    watch = Stopwatch()
    assert watch.look(0, True) == 0
    assert watch.look(1, True) == 1
    assert watch.look(500, True) == 1 + MAX_LOOK_S  # this process was stopped
    assert watch.look(501, False) == 0
    assert watch.look(502, True) == 0
