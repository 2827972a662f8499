"""The oracle: whatever went wrong on the way, every row has exactly one terminal state, and the outputs equal those of
a run where nothing went wrong. What those are the stub engine says in closed form."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import orjson

from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.packing import Chunk
from loramill.store.records import Job, ShardState

SHOWN = 12
PAGE = 64


class Wrong(AssertionError):
    """The outputs are not those of a fault-free run; the message lists how."""


@dataclass(slots=True, frozen=True)
class Expected:
    """What one row must come to."""

    custom_id: str
    adapter: str | None
    """As the row names it; None: the base."""
    content: str
    """Of the answer; of a failed row nothing."""
    status: int = 200
    code: str | None = None
    """Why it must fail, if it must."""


@dataclass(slots=True, frozen=True)
class Found:
    """One line of the output, or of the error file."""

    custom_id: str
    status: int
    content: str
    code: str | None
    model: str | None
    adapter: str | None
    sha256: str | None

    @classmethod
    def of(cls, line: bytes) -> Found:
        said = orjson.loads(line)
        response = said["response"] or {"status_code": 0, "body": {"error": said["error"]}}
        body = response["body"]
        error, served = body.get("error") or {}, body.get("loramill") or {}
        content = "".join(
            choice["text"] if "text" in choice else choice["message"]["content"] for choice in body.get("choices", ())
        )
        return cls(
            said["custom_id"], response["status_code"], content, error.get("code"), body.get("model"),
            served.get("adapter"), served.get("adapter_sha256"),
        )  # fmt: skip


@dataclass(slots=True, frozen=True)
class Outcome:
    """What a job came to, once it was found right."""

    digest: str
    committed_twice: int
    """Rows with a result in more than one chunk, of which the first counts."""


def digest(rows: Iterable[Expected | Found]) -> str:
    """Of a job's outputs in input order: ids, statuses and contents, and nothing of when or where."""
    seen = hashlib.sha256()
    for row in rows:
        seen.update(orjson.dumps([row.custom_id, row.status, row.content, row.code]) + b"\n")
    return seen.hexdigest()


def check_files(
    expected: Sequence[Expected],
    answered: Iterable[bytes],
    failed: Iterable[bytes],
    hashes: Mapping[str | None, str | None],
    base: str,
) -> str:
    """The digest of a job's two result files, given as lines. `hashes`: what adapters' lines must carry; `base`: what
    the model of a row of the base is called. Raises Wrong."""
    problems: list[str] = []
    output, errors = [Found.of(line) for line in answered], [Found.of(line) for line in failed]
    order = {row.custom_id: at for at, row in enumerate(expected)}
    for name, found in (("output", output), ("error file", errors)):
        places = [order[row.custom_id] for row in found if row.custom_id in order]
        if places != sorted(places):
            problems.append(f"the {name} is not in input order")
    counted = Counter(row.custom_id for row in (*output, *errors))
    problems += [f"{row} is unknown" for row in counted if row not in order]
    problems += [f"{row} is there {times} times" for row, times in counted.items() if times > 1]
    problems += [f"{row} is missing" for row in order if row not in counted]
    by_id = {row.custom_id: (row, False) for row in output} | {row.custom_id: (row, True) for row in errors}
    for wanted in expected:
        if wanted.custom_id in by_id:
            problems += _compare(wanted, *by_id[wanted.custom_id], hashes, base)
    if not problems:
        made = digest(sorted((*output, *errors), key=lambda row: order[row.custom_id]))
        if made == digest(expected):
            return made
        problems.append(f"the digest is {made}, a fault-free run's {digest(expected)}")
    more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise Wrong(f"{len(problems)} problems:\n" + "\n".join(problems[:SHOWN]) + more)


def _compare(
    wanted: Expected, found: Found, is_failed: bool, hashes: Mapping[str | None, str | None], base: str
) -> list[str]:
    row = wanted.custom_id
    if is_failed != (wanted.code is not None):
        why = f"failed with {found.code}" if is_failed else f"was answered, and must fail with {wanted.code}"
        return [f"{row} {why}"]
    if (found.status, found.code) != (wanted.status, wanted.code):
        return [f"{row} has {found.status} {found.code}, not {wanted.status} {wanted.code}"]
    if is_failed:
        return []
    problems = []
    if (found.adapter, found.sha256) != (wanted.adapter, hashes[wanted.adapter]):
        problems.append(f"{row} names {wanted.adapter or base} and was answered by {found.adapter or base}")
    if found.model != (wanted.adapter or base):
        problems.append(f"{row} names {wanted.adapter or base} and says it is of {found.model}")
    if found.content != wanted.content:
        problems.append(f"{row} says {found.content!r}, not {wanted.content!r}")
    return problems


def check_job(job: Job, expected: Sequence[Expected]) -> None:
    """That the store's own counts are those of the rows. Raises Wrong."""
    failing = sum(row.code is not None for row in expected)
    wanted = (JobStatus.COMPLETED, len(expected), len(expected) - failing, failing, job.shards)
    if (job.status, job.total, job.completed, job.failed, job.shards_done) != wanted:
        raise Wrong(
            f"job {job.id} is {job.status} with {job.completed} + {job.failed} of {job.total} rows and "
            f"{job.shards_done} of {job.shards} shards; expected {wanted}"
        )


def check_chunks(chunks: Iterable[Chunk], rows: int) -> int:
    """That every row has a result and, where it was committed twice, the same one. The number of rows that were.
    Raises Wrong."""
    first: dict[int, Found] = {}
    twice = 0
    for chunk in chunks:
        for done in chunk.rows():
            found = Found.of(done.line)
            if done.failed != (found.status != 200):
                raise Wrong(f"row {done.row} is marked failed={done.failed}, and its line says {found.status}")
            twice += done.row in first
            if first.setdefault(done.row, found) != found:
                raise Wrong(f"row {done.row} was committed as {first[done.row]}, and then as {found}")
    if missing := sorted(set(range(rows)) - set(first)):
        raise Wrong(f"{len(missing)} of {rows} rows have no result: {missing[:SHOWN]}")
    if extra := sorted(set(first) - set(range(rows))):
        raise Wrong(f"rows that nobody submitted have results: {extra[:SHOWN]}")
    return twice


def chunks_of(store: JobStore, job: Job) -> Iterable[Chunk]:
    """All of a job's chunks."""
    for start in range(0, job.chunks, PAGE):
        yield from store.results(job.id, start, min(PAGE, job.chunks - start))


def check_store(store: JobStore, job_id: str, expected: Sequence[Expected]) -> int:
    """What the store itself says of an ended job. The number of rows that were committed twice. Raises Wrong."""
    job = store.job(job_id)
    check_job(job, expected)
    unfinished = [shard for shard in store.shards(job_id) if shard.state is not ShardState.DONE]
    if unfinished:
        raise Wrong(f"the job is {job.status}, and shards are not done: {unfinished[:SHOWN]}")
    return check_chunks(chunks_of(store, job), len(expected))
