"""Questions at a worker: before all that waits, beside what runs, told while they are made."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import orjson
import pytest

from loramill.schemas.job import JobNames, JobSpec, JobStatus, Lane
from loramill.schemas.said import Said
from loramill.store.contract import JobStore
from loramill.store.errors import StoreFull
from loramill.store.records import NewShard
from loramill.store.sqlite_shelf import SqliteShelf
from loramill.store.sqlite_store import SqliteStore
from loramill.worker import engine_process, express
from tests.stub_engine import manifest
from tests.worker.queueing import ENVIRONMENT, answers, staged, working
from tests.worker.queueing import until as until_in

until = partial(until_in, timeout_s=120)
"""Engines start again and again here, on however busy a machine."""


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine_process, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(engine_process, "LOOK_S", 0.1)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return SqliteStore(tmp_path / "jobs.db")


def ask(store: JobStore, job_id: str, prompt: str, *, stream: bool = False) -> None:
    names = JobNames(base="stub")
    spec = JobSpec(id=job_id, base_id=manifest()[0].base_id, names=names, lane=Lane.ASK, dedupe=False, stream=stream)
    store.stage(spec)
    store.add_shard(job_id, NewShard(0, [(0, orjson.dumps({"id": job_id, "prompt": prompt}))]))
    store.accept(job_id)


def done(store: JobStore, job_id: str) -> bool:
    return store.job(job_id).status.ended


def said(store: JobStore, job_id: str) -> dict[str, str]:
    """What was said under each lease."""
    texts: dict[str, str] = {}
    for entry in map(Said.model_validate_json, store.shelf.heard(job_id)):
        for choice in entry.choices:
            assert choice.at == len(texts.get(entry.token, ""))
            texts[entry.token] = texts.get(entry.token, "") + choice.text
    return texts


def test_a_question_overtakes_thousands_of_rows(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.05")
    monkeypatch.setenv("STUB_SEQS", "4")
    staged(store, "bulk", [f"row {row}" for row in range(4000)], per_shard=500)
    with working(SqliteStore(tmp_path / "jobs.db"), threads=4):
        until(lambda: store.job("bulk").completed > 20)
        ask(store, "q", "me first")
        until(lambda: done(store, "q"))
        assert store.job("bulk").completed < 3000
        store.cancel("bulk")
    assert answers(store, "q") == {0: "ok:me first"}


def test_as_many_run_at_once_as_may(store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express, "MOST", 3)
    for number in range(8):
        ask(store, f"q{number}", f"SLOW {number}")
    with working(SqliteStore(tmp_path / "jobs.db"), threads=0) as (node, _):
        most = 0
        while not all(done(store, f"q{number}") for number in range(8)):
            most = max(most, node._express.running)
            time.sleep(0.01)
        assert most == 3
        until(lambda: node.idle)
        assert node.rows_done == 8


def test_an_answer_is_told_while_it_is_made(store: JobStore, tmp_path: Path) -> None:
    text = "SLOW: " + "words and wörds " * 20
    with working(SqliteStore(tmp_path / "jobs.db"), threads=0) as (node, _):
        until(lambda: node.ready)
        ask(store, "q", text, stream=True)
        until(lambda: bool(store.shelf.heard("q")))
        assert not done(store, "q")
        until(lambda: done(store, "q"))
    [told] = said(store, "q").values()
    assert f"ok:{text}".startswith(told)
    assert len(told) > len(text) / 2
    assert 5 < len(store.shelf.heard("q")) <= 60
    assert answers(store, "q") == {0: f"ok:{text}"}


def test_what_cannot_be_said_is_in_the_result(store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SqliteShelf, channel: str, data: bytes) -> None:
        raise StoreFull("the disk is full")

    monkeypatch.setattr(SqliteShelf, "say", full)
    with working(SqliteStore(tmp_path / "jobs.db"), threads=0):
        ask(store, "q", "SLOW", stream=True)
        until(lambda: done(store, "q"))
    assert answers(store, "q") == {0: "ok:SLOW"}


def test_it_is_told_again_after_its_engine_died(store: JobStore, tmp_path: Path) -> None:
    with working(SqliteStore(tmp_path / "jobs.db"), threads=2) as (node, _):
        until(lambda: node.ready)
        staged(store, "bulk", [f"SLOW {row}" for row in range(400)], per_shard=100)
        ask(store, "q", "SLOW " + "to the end " * 20, stream=True)
        until(lambda: bool(said(store, "q")))
        node.engines[0].kill()
        # It is under suspicion, and runs alone: the rows that wait do not come before it.
        until(lambda: done(store, "q"))
        assert store.job("bulk").completed < 200
        store.cancel("bulk")
    first, second = said(store, "q").values()
    assert second.startswith(first)
    assert answers(store, "q") == {0: "ok:SLOW " + "to the end " * 20}


def test_a_question_that_kills_engines_fails_alone(store: JobStore, tmp_path: Path) -> None:
    with working(SqliteStore(tmp_path / "jobs.db"), threads=1):
        ask(store, "q", "ABORT")
        until(lambda: done(store, "q"))
    assert answers(store, "q") == {0: "engine_crash"}


def test_a_cancelled_question_stops(store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_STEP_S", "1")
    with working(SqliteStore(tmp_path / "jobs.db"), threads=0) as (node, _):
        ask(store, "q", "SLOW")
        until(lambda: node._express.running == 1)
        store.cancel("q")
        until(lambda: done(store, "q") and node.idle)
    assert store.job("q").status is JobStatus.CANCELLED


def test_a_drain_gives_questions_back(store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_STEP_S", "1")
    with working(SqliteStore(tmp_path / "jobs.db"), threads=0) as (node, _):
        ask(store, "q", "SLOW")
        until(lambda: node._express.running == 1)
        node.drain.ask()
        ask(store, "late", "SLOW")
        until(lambda: node.idle)
    assert [shard.state for job in ("q", "late") for shard in store.shards(job)] == ["ready", "ready"]
