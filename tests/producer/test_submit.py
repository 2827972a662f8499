from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramill.producer.ask import Ask
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobStatus
from loramill.store.contract import JobStore
from loramill.store.errors import JobNotFound, StoreFull, StoreUnreachable
from loramill.store.part_files import Files
from loramill.store.records import Job, NewShard
from loramill.store.sqlite_store import SqliteStore
from tests.producer.served_by_stub import MANIFEST, Place, manifest, offer, rows


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Place(tmp_path, MANIFEST)


class Ill(SqliteStore):
    """A store of which one method fails at its `nth` call, `before` or after it did its work."""

    def __init__(self, path: Path, name: str, error: BaseException, *, nth: int = 1, before: bool = True) -> None:
        super().__init__(path)
        self.error: BaseException | None = None
        real: Callable[..., Any] = getattr(self, name)
        left = nth

        def ill(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and before:
                raise error
            done = real(*given, **named)
            if left == 0:
                raise error
            return done

        setattr(self, name, ill)


def test_a_job_has_every_row_once_and_says_what_its_names_stood_for(place: Place) -> None:
    given = rows(700, None, "a00", "a01")
    done = place.submit(given, priority=3, window_s=60.0, metadata={"team": "x"}, seed=7, dedupe=False)
    job = place.store.job(done.job.id)
    assert (job.status, job.total, job.completed) == (JobStatus.IN_PROGRESS, 700, 0)
    assert {number: json.loads(line) for number, line in place.lines(job.id).items()} == dict(enumerate(given))
    spec = job.spec
    assert {name: one.key for name, one in spec.names.adapters.items()} == {"a00": "key-00", "a01": "key-01"}
    assert (spec.base_id, spec.names.base, spec.endpoint) == (MANIFEST.base_id, "stub", "/v1/completions")
    assert (spec.priority, spec.window_s, spec.metadata, spec.seed, spec.dedupe) == (3, 60.0, {"team": "x"}, 7, False)
    shards = place.store.shards(job.id)
    assert {key for shard in shards for key in shard.adapters} == {"key-00", "key-01"}
    place.work()
    assert place.store.job(job.id).status is JobStatus.COMPLETED


def test_small_jobs_are_cut_for_all_workers_that_run(place: Place) -> None:
    for number in range(3):
        place.hello(f"w{number}", MANIFEST)
    place.hello("other", manifest(parts={"base model": "another"}))
    done = place.submit(rows(90))
    assert [shard.rows for shard in place.store.shards(done.job.id)] == [30, 30, 30]


def test_rows_that_other_workers_can_run_share_no_shard(place: Place) -> None:
    more = manifest(offer("x"), *MANIFEST.adapters)
    place.store.publish(more)
    place.hello("w1", MANIFEST)
    place.hello("w2", more)
    done = place.submit(rows(60, None, "a00", "x"))
    assert sorted(shard.adapters for shard in place.store.shards(done.job.id)) == [(), ("key-00",), ("key-x",)]
    assert done.checked is not None
    assert done.checked.able().part_of_it == ("w1",)


def test_an_adapter_that_is_served_merged_shares_no_shard(tmp_path: Path, place: Place) -> None:
    served = manifest(offer("dora", alone="DoRA"), offer("plain"))
    place.store.publish(served)
    done = place.submit(rows(60, "dora", "plain", None))
    kinds = [shard.adapters for shard in place.store.shards(done.job.id)]
    assert sorted(kinds) == [("key-dora",), ("key-plain",)]


def test_invalid_lines_refuse_the_whole_input(place: Place) -> None:
    given = [*rows(3), "{", {"id": "x", "prompt": "p", "adapter": "a0"}, {"id": "r0", "prompt": "again"}]
    with pytest.raises(Failure) as refused:
        place.submit(given)
    assert refused.value.code is ExitCode.INPUT
    line_4, line_5, line_6, total = refused.value.lines
    assert ":4: the line is not JSON" in line_4
    assert ":5: model: no adapter or model is named `a0`" in line_5
    assert ":6: custom_id: the same custom_id is on line 1" in line_6
    assert total == "3 of 6 lines are invalid: nothing was submitted; --on-invalid skip submits the others"
    assert place.store.jobs() == []


def test_invalid_lines_that_are_skipped_are_failed_rows(place: Place) -> None:
    done = place.submit([*rows(3), "{", {"id": "x", "prompt": "p", "adapter": "no"}], on_invalid="skip")
    job = place.store.job(done.job.id)
    assert (job.total, job.failed, job.status) == (5, 2, JobStatus.IN_PROGRESS)
    (chunk,) = place.store.results(job.id)
    failed = {row.row: json.loads(row.line) for row in chunk.rows()}
    assert failed.keys() == {3, 4}
    assert failed[4]["custom_id"] == "x"
    place.work()
    assert place.store.job(job.id).status is JobStatus.COMPLETED


def test_a_job_of_nothing_but_skipped_lines_is_completed_at_once(place: Place) -> None:
    done = place.submit(["{", "["], on_invalid="skip")
    assert (done.job.status, done.job.total, done.job.failed) == (JobStatus.COMPLETED, 2, 2)


@pytest.mark.parametrize(("limits", "flag"), [({"max_rows": 4}, "MAX_JOB_ROWS"), ({"max_bytes": 99}, "MAX_JOB_BYTES")])
def test_a_job_over_the_limits_is_refused(place: Place, limits: dict[str, int], flag: str) -> None:
    with pytest.raises(Failure, match=flag) as refused:
        place.submit(rows(5), **limits)
    assert refused.value.code is ExitCode.INPUT
    assert place.store.jobs() == []


@pytest.mark.parametrize("error", [StoreFull("full"), StoreUnreachable("away"), KeyboardInterrupt()])
@pytest.mark.parametrize(("name", "nth"), [("add_shard", 1), ("add_shard", 2), ("add_results", 1), ("accept", 1)])
@pytest.mark.parametrize("with_files", [False, True])
def test_whatever_fails_nothing_is_left(
    place: Place, tmp_path: Path, name: str, nth: int, error: BaseException, with_files: bool
) -> None:
    store = Ill(tmp_path / "jobs.db", name, error, nth=nth)
    store.files = Files(str(tmp_path / "parts")) if with_files else None
    with pytest.raises(type(error)):
        place.submit([*rows(600), "{"], store, on_invalid="skip", id="one")
    assert place.store.jobs() == []
    with pytest.raises(JobNotFound):
        place.store.job("one")
    assert [path for path in (tmp_path / "parts").rglob("*") if path.is_file()] == []
    place.submit(rows(600), id="one")


def test_a_lost_answer_to_accept_is_asked_for_again(place: Place, tmp_path: Path) -> None:
    """It was accepted: taking it back, with its files, would lose rows."""
    store = Ill(tmp_path / "jobs.db", "accept", StoreUnreachable("away"), before=False)
    store.files = Files(str(tmp_path / "parts"))
    done = place.submit(rows(20), store)
    assert done.job.status is JobStatus.IN_PROGRESS
    assert len(store.read_shard(done.job.id, 0)) == 20


def test_the_same_submit_again_is_the_same_job(place: Place) -> None:
    first = place.submit(rows(20), id="one", metadata={"a": "b"})
    again = place.submit(rows(20), id="one", metadata={"a": "b"})
    assert first.checked is not None
    assert again.checked is None
    assert again.job == first.job
    assert [job.id for job in place.store.jobs()] == ["one"]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"rows": rows(21)}, "another input"),
        ({"seed": 1}, "another seed"),
        ({"limit": 5, "priority": 2}, "another input and priority"),
    ],
)
def test_an_id_that_another_job_has_is_refused(place: Place, other: dict[str, Any], what: str) -> None:
    place.submit(rows(20), id="one")
    given = {"rows": rows(20), "id": "one", **other}
    with pytest.raises(Failure, match=what) as refused:
        place.submit(given.pop("rows"), **given)
    assert refused.value.code is ExitCode.USAGE


def test_a_job_that_another_is_submitting_is_left_alone(place: Place) -> None:
    class Nosy(SqliteStore):
        def add_shard(self, job_id: str, shard: NewShard) -> None:
            super().add_shard(job_id, shard)
            with pytest.raises(Failure, match="being submitted") as refused:
                submit_again(self)
            assert refused.value.code is ExitCode.MACHINE

    def submit_again(store: JobStore) -> Job:
        return place.submit(rows(20), place.store, id="one").job

    done = place.submit(rows(20), Nosy(place.folder / "jobs.db"), id="one")
    assert done.job.status is JobStatus.IN_PROGRESS
    assert len(place.lines("one")) == 20


def test_only_the_first_rows(place: Place) -> None:
    assert place.submit(rows(20), limit=3).job.total == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"id": "a b"}, "cannot be a job's id"),
        ({"id": ""}, "cannot be a job's id"),
        ({"priority": 101}, "from -100 to 100"),
        ({"window_s": 0.0}, "above 0"),
        ({"metadata": {str(n): "" for n in range(17)}}, "17 pairs"),
        ({"metadata": {"k": "v" * 513}}, "its value 512"),
    ],
)
def test_what_no_job_can_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ask(**given)
