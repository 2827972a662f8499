"""`loramill submit` and `loramill validate`: what goes where, and how they end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from loramill.schemas.job import JobStatus
from loramill.store.sqlite_store import SqliteStore
from tests.producer.served_by_stub import MANIFEST, Command, Place, manifest, offer, rows


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("LORAMILL_")]:
        monkeypatch.delenv(name)
    return Place(tmp_path, MANIFEST)


@pytest.fixture
def command(place: Place, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(place, capsys)


def test_stdout_is_the_jobs_id_alone(place: Place, command: Command) -> None:
    place.hello("w1", MANIFEST)
    code, out, err = command("submit", place.write(rows(30, None, "a00")), "--metadata", "a=b=c", "--window", "4h")
    assert code == 0
    job = place.store.job(out.strip())
    assert (job.total, dict(job.spec.metadata), job.spec.window_s) == (30, {"a": "b=c"}, 14400.0)
    assert err.splitlines() == [f"job {job.id}: 30 rows in 1 shards", "1 worker could run all of it: w1"]


def test_json_is_one_object(place: Place, command: Command) -> None:
    place.hello("w1", MANIFEST)
    path = place.write([*rows(30, None, "a00"), "{"])
    code, out, _ = command("submit", path, "--json", "--on-invalid", "skip", "--id", "mine", "--priority", "2")
    said = json.loads(out)
    assert code == 0
    assert (said["id"], said["rows"], said["shards"], said["invalid"]) == ("mine", 31, 1, 1)
    assert said["workers"] == {"all": ["w1"], "part": [], "lacking": [], "running": 1}
    assert (said["base"], said["adapters"], said["submitted_before"]) == ("stub", ["a00"], False)
    code, out, err = command("submit", path, "--json", "--on-invalid", "skip", "--id", "mine", "--priority", "2")
    assert (code, json.loads(out)["submitted_before"]) == (0, True)
    assert err == "nothing is submitted, it was before: job mine is in progress: 1 of 31 rows, 1 failed\n"
    assert len(place.store.jobs()) == 1


def test_the_same_id_with_another_input_is_a_usage_error(place: Place, command: Command) -> None:
    command("submit", place.write(rows(3)), "--id", "mine")
    code, out, err = command("submit", place.write(rows(4)), "--id", "mine")
    assert (code, out) == (2, "")
    assert err == "Error: job mine is there already, with another input: give this one another id\n"


def test_stdin_is_an_input(place: Place, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.BufferedReader(io.BytesIO(place.write(rows(5)).read_bytes()))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=given))
    code, out, _ = command("submit", "-")
    assert (code, place.store.job(out.strip()).total) == (0, 5)


@pytest.mark.parametrize("verb", ["submit", "validate"])
def test_invalid_lines_are_all_said_and_nothing_is_stored(place: Place, command: Command, verb: str) -> None:
    code, out, err = command(verb, place.write([*rows(2), "{", {"id": "x", "adapter": "a0", "prompt": "p"}]))
    assert (code, out) == (4, "")
    assert [line.split(": ")[1].rpartition(":")[2] for line in err.splitlines()[:2]] == ["3", "4"]
    assert err.splitlines()[2].startswith("Error: 2 of 4 lines are invalid: nothing was submitted" if verb == "submit"
                                          else "Error: 2 of 4 lines are invalid: nothing is submitted")  # fmt: skip
    assert place.store.jobs() == []


def test_validate_stores_nothing_and_says_who_could_run_it(place: Place, command: Command) -> None:
    place.store.publish(manifest(offer("x")))
    place.hello("w1", MANIFEST)
    path = place.write(rows(40, None, "x"))
    code, out, err = command("validate", path)
    assert (code, out) == (0, "")
    said = "1 worker could run part of it: w1; none serves `x`"
    assert err.splitlines() == [f"{path}: 40 rows, all valid", said]
    code, out, _ = command("validate", path, "--json")
    assert (code, json.loads(out)["valid"], json.loads(out)["workers"]["lacking"]) == (0, True, ["x"])
    code, out, _ = command("validate", place.write(["{"]), "--json")
    assert (code, json.loads(out)["valid"], len(json.loads(out)["problems"])) == (4, False, 2)
    assert place.store.jobs() == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.jsonl"], 4, "nowhere.jsonl: cannot be read: No such file or directory"),
        (["{input}", "--base", "other"], 4, "--base other: no worker has served it; there is stub"),
        (["{input}", "--max-job-rows", "2"], 4, "more than 2 rows"),
        (["{input}", "--max-job-bytes", "10"], 4, "a job may have 10"),
        (["{input}", "--id", "a/b"], 2, "'a/b' cannot be a job's id"),
        (["{input}", "--priority", "200"], 2, "from -100 to 100"),
        (["{input}", "--window", "soon"], 2, "'soon' is not a time"),
        (["{input}", "--metadata", "team"], 2, "'team' is not KEY=VALUE"),
        (["{input}", "--metadata", "a=1", "--metadata", "a=2"], 2, "gives a key twice"),
        (["{input}", "--adapter", "x=path"], 2, "adapters are given without --base-model"),
        (["{input}", "--base-model", "nowhere/at/all"], 4, "--base-model nowhere/at/all: no such folder"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(
    place: Place, command: Command, arguments: list[str], code: int, message: str
) -> None:
    path = place.write(rows(3))
    ended, out, err = command("submit", *(part.format(input=path) for part in arguments))
    assert (ended, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert place.store.jobs() == []


def test_a_store_where_no_worker_was_says_both_ways_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = Command(Place(tmp_path), capsys)("submit", Place(tmp_path).write(rows(3)))
    assert code == 4
    assert err == (
        "Error: no worker has told this store yet what it serves: start one with `loramill worker`, "
        "or say what it will serve: --base-model and --adapter\n"
    )


def test_models_that_are_given_need_no_worker(
    tmp_path: Path, tiny_base: Path, tiny_adapters: Path, capsys: pytest.CaptureFixture[str], place: Place
) -> None:
    """Opened without weights, and published, so that the next submit and the first worker find it."""
    other = tmp_path / "other"
    other.mkdir()
    empty = Place(other)
    command = Command(empty, capsys)
    path = empty.write(rows(20, None, "one", "two"))
    models = ["--base-model", tiny_base, "--adapters-dir", tiny_adapters]
    code, _, err = command("validate", path, *models)
    assert (code, empty.store.manifests()) == (0, [])
    assert "no worker is running yet" in err
    code, out, _ = command("submit", path, *models)
    assert code == 0
    (published,) = empty.store.manifests()
    assert {one.name for one in published.adapters} == {"one", "two", "three"}
    assert published.parts["--dtype"] == "float32"
    job = empty.store.job(out.strip())
    assert job.spec.base_id == published.base_id
    assert set(job.spec.names.adapters) == {"one", "two"}
    code, _, _ = command("submit", path)
    assert code == 0


def test_waiting_ends_as_the_job_does(place: Place, command: Command) -> None:
    path = place.write(rows(30))
    stop = threading.Event()

    def work() -> None:
        mine = SqliteStore(place.folder / "jobs.db")
        worker = Place.__new__(Place)
        worker.store = mine
        while not stop.wait(0.05):
            worker.work(fail={"r3"})

    thread = threading.Thread(target=work)
    thread.start()
    try:
        code, out, err = command("submit", path, "--wait")
    finally:
        stop.set()
        thread.join()
    assert code == 3
    assert place.store.job(out.strip()).status is JobStatus.COMPLETED
    assert err.splitlines()[-1] == f"job {out.strip()} is completed: 30 rows, 1 failed"


SLOWLY = """
import time
from loramill.store.contract import JobStore
add = JobStore.add_shard
def add_slowly(*given):
    add(*given)
    print("staging", flush=True)
    time.sleep(20)
JobStore.add_shard = add_slowly
"""


@pytest.mark.parametrize("when", ["staging", "waiting"])
def test_an_interrupt_leaves_nothing_or_a_whole_job(place: Place, when: str) -> None:
    code = f"{SLOWLY if when == 'staging' else ''}\nfrom loramill.producer.cli import main; main()"
    arguments = ["submit", str(place.write(rows(20))), "--store", place.url, "--wait"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    if when == "waiting":
        assert f"job {said} goes on" in err
        assert place.store.job(said).status is JobStatus.IN_PROGRESS
    else:
        assert (said, place.store.jobs()) == ("staging", [])
