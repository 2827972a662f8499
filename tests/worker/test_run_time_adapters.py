"""Adapters that operators have a worker load and let go of while it runs, with a real store and stub engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from loramill.producer.offers import able
from loramill.schemas.adapter_objects import AdapterWish
from loramill.schemas.job import JobNames, JobSpec, Pinned
from loramill.schemas.manifest import AdapterOffer
from loramill.store.contract import JobStore
from loramill.store.records import NewShard, ShardState, WorkerRecord
from loramill.store.sqlite_store import SqliteStore
from loramill.store.wishes import find_wish, say, take_back
from loramill.worker import engine_process, housekeeping
from loramill.worker.node import Node
from tests.contract.building import rows_of
from tests.stub_engine import manifest
from tests.worker.queueing import ENVIRONMENT, staged, until, working


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine_process, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(housekeeping, "ROUND_S", 0.1)
    monkeypatch.setattr(housekeeping, "HELLO_S", 0.3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with SqliteStore(tmp_path / "jobs.db") as opened:
        yield opened


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def running(store: JobStore, root: Path, tmp_path: Path) -> Iterator[Node]:
    with working(SqliteStore(tmp_path / "jobs.db"), adapters_dir=root) as (node, _):
        until(lambda: node.ready)
        yield node


def make(root: Path, name: str, rank: int = 4) -> Path:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "adapter_config.json").write_bytes(orjson.dumps({"r": rank}))
    return root / name


def load(store: JobStore, name: str, source: str | None = None, scale: float | None = None) -> WorkerRecord:
    """What the worker says of itself once it has answered."""
    return answered(store, name, AdapterWish(wanted=True, source=source, scale=scale))


def unload(store: JobStore, name: str) -> WorkerRecord:
    return answered(store, name, AdapterWish(wanted=False))


def answered(store: JobStore, name: str, wish: AdapterWish) -> WorkerRecord:
    stamp = say(store.shelf, name, wish).stamp
    until(lambda: any(worker.answered.get(name) == stamp for worker in store.workers()))
    [worker] = store.workers()
    return worker


def offered(store: JobStore) -> dict[str, AdapterOffer]:
    """By what the worker claims under."""
    [worker] = store.workers()
    [serving] = [one for one in store.manifests() if one.id == worker.manifest]
    return {offer.name: offer for offer in serving.adapters}


def submit(store: JobStore, job: str, prompts: list[str], offer: AdapterOffer, per_shard: int = 8) -> None:
    """A job of rows for one adapter."""
    names = JobNames(base="stub", adapters={offer.name: Pinned(key=offer.key, scale=offer.scale)})
    store.stage(JobSpec(id=job, base_id=manifest()[0].base_id, names=names))
    rows = [
        (at, orjson.dumps({"id": f"r{at}", "adapter": offer.name, "prompt": text})) for at, text in enumerate(prompts)
    ]
    for number, start in enumerate(range(0, len(rows), per_shard)):
        store.add_shard(job, NewShard(number, rows[start : start + per_shard], (offer.key,)))
    store.accept(job)


def ended(store: JobStore, job: str) -> Callable[[], bool]:
    return lambda: store.job(job).status.ended


def hashes(store: JobStore, job: str) -> set[str]:
    """Whose answers the rows got."""
    rows = rows_of(store, job).values()
    assert not any(row.failed for row in rows)
    return {orjson.loads(row.line)["response"]["body"]["loramill"]["adapter_sha256"] for row in rows}


def test_an_adapter_is_loaded_answers_and_goes(store: JobStore, root: Path, running: Node) -> None:
    make(root, "new")
    assert load(store, "new", scale=0.5).refused == {}
    offer = offered(store)["new"]
    assert (offer.scale, offer.rank) == (0.5, 4)
    submit(store, "j", [f"row {row}" for row in range(40)], offer)
    until(ended(store, "j"))
    assert hashes(store, "j") == {offer.sha256}
    unload(store, "new")
    assert "new" not in offered(store)
    assert len(offered(store)) == 16


def test_what_the_worker_was_started_with_goes_too(store: JobStore, running: Node) -> None:
    unload(store, "a03")
    assert "a03" not in offered(store)


def test_one_that_is_replaced_leaves_the_rows_of_the_former_waiting(store: JobStore, root: Path, running: Node) -> None:
    make(root, "sql")
    load(store, "sql")
    former = offered(store)["sql"]
    make(root, "sql", rank=8)
    load(store, "sql")
    latter = offered(store)["sql"]
    assert former.sha256 != latter.sha256
    submit(store, "old", ["row"], former)
    submit(store, "new", ["row"], latter)
    until(ended(store, "new"))
    assert hashes(store, "new") == {latter.sha256}
    assert store.shards("old")[0].state is ShardState.READY
    said = able(store.manifests(), store.workers(), [(former.key,)], manifest()[0].base_id).in_words({})
    assert f"none serves `{former.key[:12]}`" in said
    make(root, "sql")  # and the former is back: what waited is answered by it
    load(store, "sql")
    until(ended(store, "old"))
    assert hashes(store, "old") == {former.sha256}
    assert next(iter(store.manifests())).id == store.workers()[0].manifest, "the latest published says what names mean"


def test_rows_that_run_are_finished_by_what_goes(
    store: JobStore, root: Path, running: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(root, "sql")
    load(store, "sql")
    offer = offered(store)["sql"]
    submit(store, "j", ["SLOW row"] * 4, offer)
    [engine] = running.engines
    until(lambda: bool(engine._running) and any(engine._running.values()))
    unload(store, "sql")
    assert "sql" not in offered(store)
    assert engine.offered.admits([offer.key]), "the child has it still"
    until(ended(store, "j"))
    assert hashes(store, "j") == {offer.sha256}
    until(lambda: not engine.offered.admits([offer.key]))


def test_a_shard_that_was_claimed_before_is_given_back_once_its_adapter_is_gone(
    store: JobStore, root: Path, running: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(root, "sql")
    load(store, "sql")
    offer = offered(store)["sql"]
    [engine] = running.engines
    claimed = []
    claim = running.store.claim

    def claim_and_wait(worker: str, under: str, resident: Any = (), **given: Any) -> Any:
        if (found := claim(worker, under, resident, **given)) is not None and not claimed:
            claimed.append(found)
            unload(store, "sql")
            until(lambda: not engine.offered.admits([offer.key]))
        return found

    monkeypatch.setattr(running.store, "claim", claim_and_wait)
    submit(store, "j", ["row"], offer)
    until(lambda: bool(claimed) and store.shards("j")[0].state is ShardState.READY)
    assert (store.job("j").failed, store.shards("j")[0].attempts) == (0, 0)


def test_an_engine_that_starts_again_gets_them_again_and_its_counts_go_on(
    store: JobStore, root: Path, running: Node
) -> None:
    make(root, "sql")
    load(store, "sql")
    unload(store, "a03")
    offer = offered(store)["sql"]
    submit(store, "before", ["row"] * 16, offer)
    until(ended(store, "before"))
    until(lambda: store.workers()[0].stats["engine"]["steps"] > 0)
    before = store.workers()[0].stats
    [engine] = running.engines
    engine.kill()
    until(lambda: store.workers()[0].restarts == 1)
    assert store.workers()[0].stats["engine"]["steps"] >= before["engine"]["steps"]
    submit(store, "after", ["row"] * 16, offer)
    until(ended(store, "after"))
    until(lambda: "sql" in offered(store) and "a03" not in offered(store))
    until(lambda: store.workers()[0].stats["engine"]["steps"] > before["engine"]["steps"])
    said = store.workers()[0].stats
    answer = len("ok:row") + 1
    assert said["adapters"]["sql"] == {
        "completed": 32, "failed": 0, "prompt_tokens": 32 * len("row"), "completion_tokens": 32 * answer
    }  # fmt: skip
    assert sum(said["engine"]["step_times"]["counts"]) == said["engine"]["steps"]


def test_a_shard_of_a_job_that_runs_is_answered_by_what_came_after_its_first(
    store: JobStore, root: Path, running: Node
) -> None:
    """The child knows a job from its first shard on; what a later one needs may have come since."""
    there = offered(store)["a00"]
    make(root, "late")
    load(store, "late")
    late = offered(store)["late"]
    unload(store, "late")
    spec = JobNames(base="stub", adapters={"a00": Pinned(key=there.key), "late": Pinned(key=late.key)})
    store.stage(JobSpec(id="j", base_id=manifest()[0].base_id, names=spec))
    store.add_shard("j", NewShard(0, [(0, b'{"id":"r0","adapter":"a00","prompt":"SLOW"}')], (there.key,)))
    store.add_shard("j", NewShard(1, [(1, b'{"id":"r1","adapter":"late","prompt":"row"}')], (late.key,)))
    store.accept("j")
    [engine] = running.engines
    until(lambda: bool(engine._running) and any(engine._running.values()))
    load(store, "late")
    until(lambda: store.job("j").completed == 1)
    assert store.shards("j")[0].state is ShardState.LEASED, "the slow one was meant to be running"
    until(ended(store, "j"))
    assert hashes(store, "j") == {there.sha256, late.sha256}


REFUSED = {
    "absent": (None, "no such folder"),
    "bare": (None, "adapter_config.json: no such file"),
    "out": (None, "leads out of --adapters-dir"),
    "inside": (None, "the link leads out of --adapters-dir"),
    "up": ("../elsewhere", "leads out of --adapters-dir"),
    "away": ("/etc", "leads out of --adapters-dir"),
    "-x": ("elsewhere", "not an adapter name"),
}


def test_what_cannot_be_loaded_is_refused_and_the_worker_goes_on(
    store: JobStore, root: Path, running: Node, tmp_path: Path
) -> None:
    elsewhere = make(tmp_path, "elsewhere")
    (root / "bare").mkdir()
    (root / "out").symlink_to(elsewhere)
    make(root, "inside")
    (root / "inside" / "adapter_model.safetensors").symlink_to(elsewhere / "adapter_config.json")
    for name, (source, why) in REFUSED.items():
        assert why in load(store, name, source).refused[name]
    assert len(offered(store)) == 16
    staged(store, "j", ["row"])
    until(ended(store, "j"))
    make(root, "absent")
    assert "absent" not in load(store, "absent").refused, "said again, it is looked at again"
    assert "absent" in offered(store)


def test_without_a_folder_to_look_in(store: JobStore, tmp_path: Path) -> None:
    with working(SqliteStore(tmp_path / "jobs.db")):
        said = load(store, "x")
    assert said.refused == {"x": "this worker has no --adapters-dir to look for it in"}


def test_a_worker_that_starts_later_does_the_same(store: JobStore, root: Path, tmp_path: Path) -> None:
    make(root, "sql")
    say(store.shelf, "sql", AdapterWish(wanted=True))
    say(store.shelf, "a00", AdapterWish(wanted=False))
    with working(SqliteStore(tmp_path / "jobs.db"), adapters_dir=root):
        until(lambda: bool(store.workers()) and set(store.workers()[0].answered) == {"sql", "a00"})
        assert set(offered(store)) == {"sql", *(f"a{number:02}" for number in range(1, 16))}


def test_a_wish_is_taken_back_unless_more_was_said(store: JobStore) -> None:
    first = say(store.shelf, "x", AdapterWish(wanted=True, source="there", scale=2))
    second = say(store.shelf, "x", AdapterWish(wanted=False))
    take_back(store.shelf, first, None)
    assert find_wish(store.shelf, "x") == second
    take_back(store.shelf, second, first)
    again = find_wish(store.shelf, "x")
    assert again is not None
    assert (again.wanted, again.source, again.scale) == (True, "there", 2)
    assert again.stamp not in (first.stamp, second.stamp)
    take_back(store.shelf, again, None)
    assert find_wish(store.shelf, "x") is None
