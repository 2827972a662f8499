"""From an input to an accepted job: checked, planned, cut and stored, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import gettempdir

import numpy as np
from numpy.typing import NDArray

from loramill.producer.ask import Ask
from loramill.producer.index import Index
from loramill.producer.invalid import InvalidLines, Refused, refused
from loramill.producer.job_plan import Draft, JobPlan
from loramill.producer.offers import Able, Offer
from loramill.producer.pinning import pin
from loramill.producer.reader import Input
from loramill.producer.served import Served
from loramill.producer.shards import Need, Shard, cut, rows_a_shard
from loramill.producer.validate import validate
from loramill.schemas.errors import ErrorCode
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobError, JobSpec, JobStatus
from loramill.store.contract import JobStore
from loramill.store.errors import JobNotFound, StoreError
from loramill.store.records import Job, NewShard

_INVALID_ROWS = 1024
# What a plan assumes of engines that it has not seen: it only groups rows, and what it orders by is their lengths.
_MAX_NUM_SEQS = 256
_MAX_NUM_BATCHED_TOKENS = 8192

Progress = Callable[[int], None]


@dataclass(slots=True, frozen=True)
class Checked:
    """An input without a fault, or without the lines that have one, and how it is cut."""

    source: Input
    index: Index
    served: Served
    shards: list[Shard]

    def able(self) -> Able:
        """Which of the running workers could run it."""
        return self.served.able({shard.adapters for shard in self.shards})

    @property
    def names(self) -> dict[str, str]:
        """Of the keys of its adapters."""
        keys = self.served.offer.keys
        return {keys[name]: name for name in self.index.adapters}


@dataclass(slots=True, frozen=True)
class Submitted:
    """An accepted job."""

    job: Job
    checked: Checked | None
    """None if it was there before: nothing was submitted again."""


def check(
    source: Input,
    served: Served,
    ask: Ask,
    invalid: InvalidLines,
    on_progress: Progress | None = None,
    verdict: str = "nothing was submitted; --on-invalid skip submits the others",
) -> Checked:
    """Raises Refused with every problem of the input, unless they go into `invalid`; InputError."""

    def counted(rows: int) -> None:
        if rows > ask.max_rows:
            raise _too_large(source, f"more than {ask.max_rows:,} rows: LORAMILL_MAX_JOB_ROWS")
        if on_progress:
            on_progress(rows)

    skip = ask.on_invalid == "skip"
    offer = served.offer
    index = validate(
        source,
        offer.prompter,
        names=offer.names,
        max_mix=offer.max_mix,
        max_rows=ask.limit,
        endpoint=ask.endpoint,
        on_invalid=invalid.add if skip else None,
        on_progress=counted,
    )
    if index.problem_count and not skip:
        raise refused(index, source.name, verdict)
    size = int(index.length.sum(dtype=np.int64))
    if size > ask.max_bytes:
        limit = f"a job may have {ask.max_bytes:,}: LORAMILL_MAX_JOB_BYTES"
        raise _too_large(source, f"{size:,} bytes of lines; {limit}")
    plan = plan_of(index, served.offer, np.arange(len(index)))
    return Checked(source, index, served, shards_of(index, served, plan, _running(index, served)))


def _too_large(source: Input, why: str) -> Refused:
    return Refused([JobError(code=ErrorCode.TOO_MANY_TASKS, message=why)], f"{source.name}: {why}")


def submit(
    store: JobStore,
    source: Input,
    ask: Ask,
    look: Callable[[], Served],
    on_progress: Progress | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> Submitted:
    """The job of `source`, accepted. If a job of that id is there already, it is that one, and nothing happens.

    `look` says what can be asked for; what `go_on` raises, which is called before each shard, ends it. Whatever
    happens, an interrupt too, the job is accepted as a whole, or it is as if nothing had been submitted. Raises
    Failure: INPUT for an input that is refused, USAGE if the job of that id is another; InputError, StoreError.
    """
    if before := _before(store, source, ask):
        return Submitted(before, None)
    served = look()
    with closing(InvalidLines(Path(gettempdir()))) as invalid:
        checked = check(source, served, ask, invalid, on_progress)
        return Submitted(put_job(store, checked, ask, invalid, go_on), checked)


def put_job(
    store: JobStore, checked: Checked, ask: Ask, invalid: InvalidLines, go_on: Callable[[], None] = lambda: None
) -> Job:
    """Stores a job that is not there yet, and has it accepted; whole or not at all, as `submit`. Raises StoreError."""
    spec = _spec(checked, ask)
    store.stage(spec)
    try:
        for number, rows in enumerate(_rows(checked)):
            go_on()
            store.add_shard(spec.id, NewShard(number, rows, checked.shards[number].adapters))
        failed = invalid.rows(spec.id)
        while some := list(islice(failed, _INVALID_ROWS)):
            store.add_results(spec.id, some)
        go_on()
        return store.accept(spec.id)
    except BaseException:
        if accepted := _withdrawn(store, spec.id):
            return accepted
        raise


def _before(store: JobStore, source: Input, ask: Ask) -> Job | None:
    """The accepted job of this id, if there is one. Raises Failure if it is another, or is not accepted yet."""
    try:
        job = store.job(ask.id)
    except JobNotFound:
        return None
    if differences := ask.differences(job.spec, source.sha256):
        what = f"job {ask.id} is there already, with another {' and '.join(differences)}"
        raise Failure(ExitCode.USAGE, f"{what}: give this one another id")
    if job.status is JobStatus.VALIDATING:
        what = f"job {ask.id} is being submitted by another process"
        raise Failure(ExitCode.MACHINE, f"{what}; if that one is dead, what it left goes within an hour")
    return job


def _withdrawn(store: JobStore, job_id: str) -> Job | None:
    """Takes back what was staged; the job instead, if it was accepted after all: the answer can be lost on its way.
    What a store that is away keeps of it is seen by no worker, and reaped."""
    with suppress(StoreError):
        job = store.job(job_id)
        if job.status is not JobStatus.VALIDATING:
            return job
        store.abandon(job_id)
    return None


def plan_of(index: Index, offer: Offer, left: NDArray[np.int64]) -> JobPlan:
    """In which order the rows at positions `left` start, on whatever engine: side by side wherever that can be."""
    draft = Draft(index, left, offer.names, offer.facts)
    return draft.plan(
        slots=offer.max_mix,
        max_num_seqs=_MAX_NUM_SEQS,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS,
        max_loaded_loras=None,
        pinned=frozenset(),
        mode="dynamic",
        order="throughput",
        costs=None,
        decided={},
        to_cut=True,
    )


def shards_of(index: Index, served: Served, plan: JobPlan, takers: int) -> list[Shard]:
    """A job's rows as `plan` has all of them, cut so that so many can have some."""
    offer = served.offer
    kinds = [frozenset(offer.keys[name] for name, _ in uses) for uses in index.mixes]
    alone = [any(offer.names.adapters[name].alone for name, _ in uses) for uses in index.mixes]
    servers = served.servers([*kinds, frozenset()])
    needs = [
        Need(kind, str(uses) if is_alone else server)
        for kind, is_alone, server, uses in zip(kinds, alone, servers, index.mixes, strict=False)
    ]
    base = Need(apart=servers[-1])
    most = rows_a_shard(len(index), takers)
    needs.append(base)
    return list(cut(plan.order, index.mix, index.length, needs, max_loras=offer.max_loras, max_rows=most))


def _running(index: Index, served: Served) -> int:
    """How many of the running workers could run some of it."""
    keys = served.offer.keys
    kinds = [tuple({keys[name] for name, _ in uses}) for uses in index.mixes]
    able = served.able(kinds + ([()] if (index.mix < 0).any() else []))
    return len(able.all_of_it) + len(able.part_of_it)


def _spec(checked: Checked, ask: Ask) -> JobSpec:
    index, offer, source = checked.index, checked.served.offer, checked.source
    names = pin(offer.names, offer.keys, index.mixes, base=bool((index.mix < 0).any()))
    endpoint = next(iter(index.endpoints)) if len(index.endpoints) == 1 else None
    return ask.spec(source.name, source.sha256, offer.base_id, names, endpoint)


def _rows(checked: Checked) -> Iterator[list[tuple[int, bytes]]]:
    """The rows of each shard in turn, read again."""
    index, source = checked.index, checked.source
    for shard in checked.shards:
        at = shard.rows
        columns = index.row[at].tolist(), index.offset[at].tolist(), index.length[at].tolist()
        yield [(row, source.read(offset, length)) for row, offset, length in zip(*columns, strict=True)]
