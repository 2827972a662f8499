"""No shard waits for ever: what can pass it over, and for how long that can last.

A shard of rank r is passed over only for shards of rank up to r + AFFINITY_S. A job submitted at t with priority p
has rank t - PRIORITY_S * p or, with a window, at least t - DEADLINE_LEAD_S if that is less. So all that can go first
has been submitted by r + AFFINITY_S + max(PRIORITY_S * highest priority, DEADLINE_LEAD_S): from then on what is
before the shard only becomes less.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.schemas.manifest import Manifest
from loramill.store.contract import AFFINITY_S, DEADLINE_LEAD_S, PRIORITY_S, rank_s
from loramill.store.records import Claim
from tests.contract.building import a_chunk, a_manifest, a_shard, submitted
from tests.contract.model import Model
from tests.contract.places import Clock

ADAPTERS = "abcdef"
SLOTS = 2


@dataclass(slots=True)
class Worker:
    """Runs one shard at a time, and keeps the adapters of the last ones, as a worker's slots do."""

    name: str
    manifest: Manifest
    resident: list[str] = field(default_factory=list)
    claim: Claim | None = None
    free_ms: int = 0


@dataclass(slots=True, frozen=True)
class Waiting:
    """A ready shard, as a worker could have it."""

    job: str
    number: int
    rank: float
    adapters: frozenset[str]


def ready_for(model: Model, manifest: Manifest) -> list[Waiting]:
    """The ready shards that a manifest can serve."""
    keys = {offer.key for offer in manifest.adapters}
    found = []
    for job in model.jobs(limit=10**6):
        if job.accepted_ms is None or job.status.ended:
            continue
        expires_s = None if job.expires_ms is None else job.expires_ms / 1000
        rank = rank_s(job.accepted_ms / 1000, job.spec.priority, expires_s)
        found += [
            Waiting(job.id, shard.number, rank, frozenset(shard.adapters))
            for shard in model.shards(job.id)
            if shard.state == "ready" and keys.issuperset(shard.adapters) and len(shard.adapters) <= manifest.max_loras
        ]
    return found


arrivals = st.lists(
    st.tuples(
        st.sampled_from((0, 1, 30, 200, 700, 2000)),  # seconds since the one before
        st.integers(-3, 3),
        st.sampled_from((None, None, 600.0, 5000.0)),
        st.lists(st.sets(st.sampled_from(ADAPTERS), max_size=2), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(arrivals, st.lists(st.tuples(st.sets(st.sampled_from(ADAPTERS), max_size=2), st.integers(0, 900)), max_size=60))
def test_a_shard_is_passed_over_only_for_what_came_early_enough(arrivals: list, claims: list) -> None:  # type: ignore[type-arg]
    clock, manifest = Clock(), a_manifest(ADAPTERS)
    model = Model(clock)
    model.publish(manifest)
    jobs, claims = list(enumerate(arrivals)), list(claims)
    while jobs or claims:
        if jobs and (not claims or len(jobs) * 3 >= len(claims)):
            number, (seconds, priority, window_s, shards) = jobs.pop(0)
            clock.advance(seconds)
            parts = [a_shard(at, 1, "".join(sorted(adapters))) for at, adapters in enumerate(shards)]
            submitted(model, f"j{number:02}", *parts, priority=priority, window_s=window_s)
            continue
        resident, seconds = claims.pop(0)
        clock.advance(seconds)
        model.reap()
        waiting = ready_for(model, manifest)
        claim = model.claim("w", manifest.id, sorted(resident))
        assert (claim is None) == (not waiting), "nothing is left lying that suits"
        if claim is not None:
            taken = next(one for one in waiting if (one.job, one.number) == (claim.lease.job, claim.lease.shard))
            for passed in waiting:
                assert taken.rank <= passed.rank + AFFINITY_S
                if passed.adapters <= resident:
                    assert taken.rank <= passed.rank, "what is all resident is passed over for nothing later"
            model.commit(claim.lease, a_chunk(claim.lease.shard, [0]))


def latest_s(passed: Waiting, highest: int, windows: bool) -> float:
    """What is submitted after this time never goes before the shard."""
    return passed.rank + AFFINITY_S + max(PRIORITY_S * highest, DEADLINE_LEAD_S if windows else 0.0)


@dataclass(slots=True)
class Simulation:
    """Two workers that share two of their adapters, busy for almost all of their time. Nine jobs in ten want those two
    and are urgent: what a lonely old shard has to fear."""

    highest: int
    """Priority of those."""
    window_s: float | None
    """And their window."""
    seed: int
    clock: Clock = field(default_factory=Clock)
    waits_s: list[float] = field(default_factory=list)

    def run(self, hours: float) -> None:
        """Submits for so long, and works until nothing is left."""
        chance, model = random.Random(self.seed), Model(self.clock, retention_s=60.0)
        workers = [
            Worker("w-0", a_manifest("abcd", max_loras=SLOTS)),
            Worker("w-1", a_manifest("cdef", max_loras=SLOTS)),
        ]
        for worker in workers:
            model.publish(worker.manifest)
        accepted: dict[str, int] = {}
        next_ms, until_ms = self.clock.now_ms, self.clock.now_ms + round(hours * 3_600_000)
        while self.clock.now_ms < until_ms or any(model.ready().values()):
            if next_ms <= self.clock.now_ms < until_ms:
                accepted[self.submit(model, chance, f"j{len(accepted):05}")] = self.clock.now_ms
                next_ms = self.clock.now_ms + round(chance.expovariate(1 / 62) * 1000)
            for worker in workers:
                if worker.claim is not None and self.clock.now_ms >= worker.free_ms:
                    model.commit(worker.claim.lease, a_chunk(worker.claim.lease.shard, [0]))
                    worker.claim = None
                if worker.claim is None:
                    self.claim(model, worker, accepted)
                    worker.free_ms = self.clock.now_ms + chance.randint(15, 50) * 1000
                else:
                    model.pulse([worker.claim.lease], renew=True)
            model.reap()
            self.clock.advance(5)

    def submit(self, model: Model, chance: random.Random, job_id: str) -> str:
        """One job of one to six shards."""
        popular = chance.random() < 0.9
        adapters = "cd" if popular else chance.choice(("a", "ab", "e", "ef", "", "c"))
        parts = [a_shard(at, 1, adapters) for at in range(chance.randint(1, 6))]
        given = {"priority": self.highest, "window_s": self.window_s} if popular else {}
        submitted(model, job_id, *parts, **given)
        return job_id

    def claim(self, model: Model, worker: Worker, accepted: dict[str, int]) -> None:
        """The next shard for a worker; whoever waits and was passed over has been so within the bound."""
        waiting = ready_for(model, worker.manifest)
        worker.claim = model.claim(worker.name, worker.manifest.id, worker.resident)
        if worker.claim is not None:
            worker.resident = list(dict.fromkeys([*worker.claim.adapters, *worker.resident]))[:SLOTS]
            taken_s = accepted[worker.claim.lease.job] / 1000
            self.waits_s.append(self.clock.now_ms / 1000 - taken_s)
            for passed in waiting:
                assert taken_s <= latest_s(passed, self.highest, self.window_s is not None)


@pytest.mark.parametrize(
    ("highest", "window_s"), [(0, None), (3, None), (0, 1800.0)], ids=["affinity", "priority", "deadline"]
)
def test_a_busy_day_leaves_nobody_waiting(highest: int, window_s: float | None) -> None:
    day = Simulation(highest, window_s, seed=5)
    day.run(hours=12.0)
    print(f"\nlongest wait {max(day.waits_s):.0f} s, median {sorted(day.waits_s)[len(day.waits_s) // 2]:.0f} s")
    assert len(day.waits_s) > 2000
