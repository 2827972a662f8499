"""One list of commands, run by the model and by a real store: the same answers, errors and state after every one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loramill.schemas.job import JobError, Lane
from loramill.store.contract import JobStore
from loramill.store.errors import StoreError
from loramill.store.records import Claim, DoneRow, Job, Lease, ShardInfo, Verdict
from tests.contract.building import a_chunk, a_manifest, a_shard, a_spec, a_worker, rows_of
from tests.contract.model import Model
from tests.contract.places import Place

MANIFESTS = (a_manifest("abc", max_loras=3), a_manifest("bd", max_loras=1))
"""What the two workers serve: neither can run everything."""
# Longer than every lease, window, staging and retention, and shorter than each: 1 s never adds up to one of them, since
# every command takes a millisecond.
STEPS_S = (0.2, 5.0, 29.0, 31.0, 299.0, 3000.0, 4000.0, 90_000.0)
RETENTION_S = 86_400.0

which = st.integers(0, 10**6)
"""Chosen among those that there are."""
windows = st.sampled_from((None, None, None, 20.0, 3500.0, 20_000.0))
sizes = st.sampled_from((1, 3, 9))
needed = st.sets(st.sampled_from("abcd"), max_size=3)
lanes = st.sampled_from((Lane.BULK, Lane.BULK, Lane.ASK))
resident = st.sets(st.sampled_from("abcd")).map(sorted)


@dataclass(slots=True)
class Held:
    """The same lease in both, and what is known of its shard."""

    model: Lease
    store: Lease
    rows: int
    committed: set[int]


class StoreMachine(RuleBasedStateMachine):
    """Drives a store and the model side by side."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.model = Model(place.clock, retention_s=RETENTION_S)
        self.store = self.open()
        self.names: list[str] = []
        self.leases: list[Held] = []
        self.tokens: set[tuple[str, int, str]] = set()

    def open(self) -> Any:
        return self.place.open(retention_s=RETENTION_S)

    def both(self, method: str, *args: Any, **named: Any) -> tuple[Any, Any]:
        """Runs one command on both; the answers, or the kinds of error, which must be the same."""
        self.place.clock.advance(0.001)
        expected = answer(lambda: getattr(self.model, method)(*args, **named))
        found = answer(lambda: getattr(self.store, method)(*args, **named))
        assert same(found) == same(expected), f"{method}{args}"
        return expected, found

    def leased(self, at: int, command: Callable[[JobStore, Lease], Any]) -> tuple[Any, Any]:
        """The same for a command about one lease, which is not the same in both."""
        held = self.leases[at % len(self.leases)]
        self.place.clock.advance(0.001)
        expected = answer(lambda: command(self.model, held.model))
        found = answer(lambda: command(self.store, held.store))
        assert same(found) == same(expected), f"{held}"
        return expected, found

    def keep(self, expected: Any, found: Any) -> None:
        """A claim that both gave: it is the same shard, and its token was never given before."""
        if isinstance(expected, Claim):
            token = (found.lease.job, found.lease.shard, found.lease.token)
            assert token not in self.tokens
            self.tokens.add(token)
            done = {position for position in range(expected.rows) if expected.is_done(position)}
            self.leases.append(Held(expected.lease, found.lease, expected.rows, done))

    def job_id(self, at: int) -> str:
        return self.names[at % len(self.names)]

    @initialize()
    def publish(self) -> None:
        for manifest in MANIFESTS:
            self.both("publish", manifest)
        # Something to work on: most of what can go wrong goes wrong with leases.
        for shards in ([(9, {"a"}), (3, {"b"}), (1, set())], [(9, {"b", "c"}), (3, {"d"})]):
            self.submit(shards, 0, None, Lane.BULK)
        for worker in range(len(MANIFESTS)):
            self.claim(worker, [], Lane.BULK)

    # Submitting.

    @rule(
        priority=st.integers(-1, 1),
        window_s=st.sampled_from((None, None, 20.0, 3500.0, 20_000.0)),
        other=st.just(0) | which,
        lane=lanes,
    )
    def stage(self, priority: int, window_s: float | None, other: int, lane: Lane) -> None:
        self.names.append(f"job-{len(self.names) * 7919 % 1000:03}")
        base = "another" if other == 9 else "tiny"
        self.both("stage", a_spec(self.names[-1], base=base, priority=priority, window_s=window_s, lane=lane))

    @rule(
        shards=st.lists(st.tuples(sizes, needed), max_size=3),
        priority=st.integers(-1, 1),
        window_s=windows,
        lane=lanes,
    )
    def submit(self, shards: list[tuple[int, set[str]]], priority: int, window_s: float | None, lane: Lane) -> None:
        self.stage(priority, window_s, 0, lane)
        for number, (rows, adapters) in enumerate(shards):
            self.both("add_shard", self.names[-1], a_shard(number, rows, "".join(sorted(adapters))))
        self.both("accept", self.names[-1])

    @precondition(lambda self: self.names)
    @rule(at=which, rows=sizes, adapters=needed)
    def add_shard(self, at: int, rows: int, adapters: set[str]) -> None:
        try:
            number = len(self.model.shards(self.job_id(at)))
        except StoreError:
            number = 0
        self.both("add_shard", self.job_id(at), a_shard(number, rows, "".join(sorted(adapters))))

    @precondition(lambda self: self.names)
    @rule(at=which, rows=st.integers(1, 3))
    def add_results(self, at: int, rows: int) -> None:
        number = self.place.clock.now_ms  # never the same twice
        self.both("add_results", self.job_id(at), [DoneRow(number + i, True, b"invalid") for i in range(rows)])

    @precondition(lambda self: self.names)
    @rule(at=which, fate=st.sampled_from(("accept", "accept", "accept", "refuse", "abandon", "abandon")))
    def decide(self, at: int, fate: str) -> None:
        errors = [[JobError(code="invalid_json", message="no", line=3)]] if fate == "refuse" else []
        staged = answer(lambda: self.model.job(self.job_id(at)))
        # Whoever accepts what was accepted may be told either; nobody's result depends on it.
        if fate == "abandon" or not isinstance(staged, Job) or staged.status == "validating":
            self.both(fate, self.job_id(at), *errors)

    # Working.

    @rule(worker=st.integers(0, 1), resident=resident, lane=lanes)
    def claim(self, worker: int, resident: list[str], lane: Lane) -> None:
        self.keep(*self.both("claim", f"worker-{worker}", MANIFESTS[worker].id, resident, lane=lane))

    @rule(worker=st.integers(0, 1), lane=lanes)
    def claim_again(self, worker: int, lane: Lane) -> None:
        self.claim(worker, [], lane)

    @precondition(lambda self: self.leases)
    @rule(renew=st.booleans(), some=st.lists(which, max_size=4))
    def pulse(self, renew: bool, some: list[int]) -> None:
        chosen = [self.leases[at % len(self.leases)] for at in dict.fromkeys(some)]
        self.place.clock.advance(0.001)
        expected = self.model.pulse([held.model for held in chosen], renew=renew)
        assert self.store.pulse([held.store for held in chosen], renew=renew) == expected

    @precondition(lambda self: self.leases)
    @rule(at=which, some=st.sets(st.integers(0, 8), min_size=1), odd=st.booleans(), by=st.sampled_from("xy"))
    def commit(self, at: int, some: set[int], odd: bool, by: str) -> None:
        held = self.leases[at % len(self.leases)]
        positions = sorted({position % held.rows for position in some}, reverse=odd)
        chunk = a_chunk(held.model.shard, positions, by=f"{by}{held.model.token}", failed=positions[::3] if odd else ())
        expected, _ = self.leased(at, lambda store, lease: store.commit(lease, chunk))
        if not isinstance(expected, type):
            held.committed.update(positions)

    @precondition(lambda self: self.leases)
    @rule(at=which)
    def commit_rest(self, at: int) -> None:
        self.commit(at, set(range(self.leases[at % len(self.leases)].rows)), False, "z")

    @precondition(lambda self: self.leases)
    @rule(at=which, position=st.integers(0, 8))
    def strike(self, at: int, position: int) -> None:
        place = position % self.leases[at % len(self.leases)].rows
        self.leased(at, lambda store, lease: store.strike(lease, place))

    @precondition(lambda self: self.leases)
    @rule(at=which, suspects=st.sets(st.integers(0, 8), max_size=3))
    def release(self, at: int, suspects: set[int]) -> None:
        held = self.leases[at % len(self.leases)]
        running = sorted({position % held.rows for position in suspects} - held.committed)
        self.leased(at, lambda store, lease: store.release(lease, suspects=running))

    @precondition(lambda self: self.leases)
    @rule(at=which, worker=st.integers(0, 1))
    def reclaim(self, at: int, worker: int) -> None:
        held = self.leases[at % len(self.leases)]
        if self.model.pulse([held.model], renew=False) == [Verdict.FENCED]:
            self.keep(*self.leased(at, lambda store, lease: store.reclaim(f"worker-{worker}", lease)))

    # What happens.

    @rule(seconds=st.sampled_from(STEPS_S))
    def time_passes(self, seconds: float) -> None:
        self.place.clock.advance(seconds)

    @rule()
    def reap(self) -> None:
        self.both("reap")

    @precondition(lambda self: self.names)
    @rule(at=which)
    def cancel(self, at: int) -> None:
        self.both("cancel", self.job_id(at))

    @precondition(lambda self: self.names)
    @rule(at=which)
    def purge(self, at: int) -> None:
        self.both("purge", self.job_id(at))

    @rule(worker=st.integers(0, 1), gone=st.booleans())
    def says(self, worker: int, gone: bool) -> None:
        record = a_worker(f"worker-{worker}", MANIFESTS[worker], rows_done=self.place.clock.now_ms)
        self.both("goodbye", record.id) if gone else self.both("hello", record)

    @rule()
    def crash(self) -> None:
        """The handle is dropped as it is, and another process goes on."""
        self.store = self.open()

    # What must be the same at all times.

    @invariant()
    def alike(self) -> None:
        assert self.store.ready() == self.model.ready()
        assert self.store.backlog() == self.model.backlog()
        assert self.store.info().leases_expired == self.model.info().leases_expired
        assert self.store.workers() == self.model.workers()
        assert self.store.manifests() == self.model.manifests()
        assert [same(job) for job in self.store.jobs(limit=50)] == [same(job) for job in self.model.jobs(limit=50)]
        found = self.store.pulse([held.store for held in self.leases], renew=False)
        assert found == self.model.pulse([held.model for held in self.leases], renew=False)
        found = [answer(partial(self.model.job, name)) for name in self.names]
        going = [job for job in found if isinstance(job, Job)]
        for job in going:
            assert same(self.store.job(job.id)) == same(job)
            assert self.shards(self.store, job.id) == self.shards(self.model, job.id)
            assert rows_of(self.store, job.id) == rows_of(self.model, job.id)
            numbers = [event.number for event in self.store.events(job.id)]
            assert numbers == list(range(1, len(numbers) + 1))
        if not any(job.status in ("cancelling", "finalizing") for job in going):
            assert self.store.info().pending_rows == self.model.info().pending_rows

    def shards(self, store: JobStore, job_id: str) -> list[ShardInfo]:
        """As the store says, without suspects that have their result: whether those are kept is its own affair."""
        return [replace(shard, suspects=self.model.undone(job_id, shard)) for shard in store.shards(job_id)]

    def teardown(self) -> None:
        self.store.close()


def answer(call: Callable[[], Any]) -> Any:
    """What it returns, or the kind of StoreError that it raises."""
    try:
        return call()
    except StoreError as error:
        return type(error)


def same(found: Any) -> Any:
    """An answer without what may differ: tokens, suspects that have their result, and how many chunks there are."""
    if isinstance(found, Claim):
        suspects = {position: lone for position, lone in found.suspects.items() if not found.is_done(position)}
        done = [found.is_done(position) for position in range(found.rows)]
        lease = (found.lease.job, found.lease.shard, found.lease.seconds)
        return (lease, found.rows, found.adapters, done, suspects, found.attempts)
    if isinstance(found, Job):
        return replace(found, chunks=0)
    if isinstance(found, Iterable) and not isinstance(found, str):
        return [same(one) for one in found]
    return found


def test_the_machine_sees_no_difference(new_place: Callable[[], Place]) -> None:
    run_state_machine_as_test(
        lambda: StoreMachine(new_place()), settings=settings(max_examples=40, stateful_step_count=40)
    )
