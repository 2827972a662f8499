"""status, watch, wait, results, cancel, retry and list, as commands on a real store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramill.producer.cli import main
from tests.e2e.conftest import Ended
from tests.producer.queued import Queue, ids, until_open


class Shell:
    """Runs `loramill` commands against one store, from the folder of the test."""

    def __init__(self, queue: Queue, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.queue, self.folder, self._capsys = queue, folder, capsys

    def __call__(self, *arguments: object, store: str | None = None) -> Ended:
        """In this process; no line of it may be a traceback."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments), "--store", store or self.queue.url])
        said = self._capsys.readouterr()
        assert "Traceback" not in said.err
        return Ended(int(end.value.code or 0), said.out, said.err)

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """As a process, the store in its environment."""
        code = f"from loramill.producer.cli import main\nmain({[str(one) for one in arguments]!r})"
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=self.folder, env={**os.environ, "LORAMILL_STORE": self.queue.url}, **options,
        )  # fmt: skip


@pytest.fixture
def queue(tmp_path: Path, tiny_base: Path) -> Iterator[Queue]:
    (tmp_path / "store").mkdir()
    made = Queue(tmp_path / "store", tiny_base)
    with made.store:
        yield made


@pytest.fixture
def shell(queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "store"))
    return Shell(queue, tmp_path, capsys)


def end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return Ended(process.returncode, out, err)


def eventually(found: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not found():
        assert time.monotonic() < until
        time.sleep(0.05)


BY_ID = ["status", "watch", "wait", "results", "cancel", "retry"]


@pytest.mark.parametrize("command", BY_ID)
def test_a_job_that_is_not_there(shell: Shell, command: str) -> None:
    ended = shell(command, "nobody")
    assert ended.code == 7
    assert ended.out == ""
    assert "nobody" in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("command", [*BY_ID, "list"])
def test_a_store_to_which_nothing_was_submitted(shell: Shell, command: str, tmp_path: Path) -> None:
    """Never `0 jobs`, and no file is made by looking."""
    ended = shell(command, *["job"] * (command != "list"), store=f"sqlite:///{tmp_path}/other.db")
    assert (ended.code, ended.out) == (1, "")
    assert "nothing was ever submitted" in ended.err
    assert not (tmp_path / "other.db").exists()


@pytest.mark.parametrize(
    ("store", "code", "says"),
    [("nonsense", 2, "nonsense"), ("sqlite:////nowhere/at/all.db", 1, "/nowhere/at"), ("ftp://host/1", 2, "ftp")],
)
def test_stores_that_cannot_be_used(shell: Shell, store: str, code: int, says: str) -> None:
    ended = shell("list", store=store)
    assert ended.code == code
    assert says in ended.err
    assert len(ended.err.splitlines()) == 1


def test_no_store_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["list"])
    assert end.value.code == 2
    assert "LORAMILL_STORE" in capsys.readouterr().err


def test_a_store_that_is_no_store(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a shopping list, and a long one at that" * 99)
    ended = shell("list", store=f"sqlite:///{tmp_path}/notes.txt")
    assert ended.code == 1
    assert "notes.txt" in ended.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_a_store_that_may_not_be_read(shell: Shell) -> None:
    shell.queue.path.chmod(0)
    ended = shell("list")
    shell.queue.path.chmod(0o600)
    assert ended.code == 1
    assert "jobs.db" in ended.err


def test_a_results_folder_that_is_not_there_or_is_a_file(shell: Shell, tmp_path: Path) -> None:
    shell.queue.submit(rows=2)
    shell.queue.run()
    gone = shell("results", "job", "-o", tmp_path / "gone" / "out.jsonl")
    assert gone.code == 1
    assert "does not exist" in gone.err
    folder = shell("results", "job", "-o", tmp_path)
    assert folder.code == 2
    assert "not a regular file" in folder.err


def test_results_on_a_full_or_small_disk(shell: Shell, tmp_path: Path) -> None:
    """No half file is left."""
    shell.queue.submit(rows=200, shard_rows=200)
    shell.queue.run(text="long" * 100)
    before = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    before += "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    code = f"{before}\nfrom loramill.producer.cli import main\nmain(['results', 'job', '-o', 'out.jsonl'])"
    environment = {**os.environ, "LORAMILL_STORE": shell.queue.url}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_wait_ends_as_the_job_did(shell: Shell) -> None:
    shell.queue.submit("fine", rows=3)
    shell.queue.submit("failing", rows=3)
    shell.queue.run(fail={"none"})
    fine = shell("wait", "fine")
    assert (fine.code, fine.out, fine.err) == (0, "", "job fine is completed: 3 rows\n")
    shell.queue.submit("bad", rows=3)
    shell.queue.run(fail={"r1"})
    bad = shell("wait", "bad", "--json")
    assert bad.code == 3
    assert json.loads(bad.out)["failed"] == 1
    shell.queue.submit("off", rows=3)
    shell.queue.store.cancel("off")
    assert shell("wait", "off").code == 5


def test_a_wait_that_times_out(shell: Shell) -> None:
    shell.queue.submit(rows=10)
    shell.queue.run(shards=1)
    started_s = time.monotonic()
    ended = shell("wait", "job", "--timeout", "0.5s")
    assert ended.code == 124
    assert 0.5 <= time.monotonic() - started_s < 5
    assert ended.err == "Error: waited 500 ms: job job is in progress: 4 of 10 rows; it goes on\n"


def test_a_timeout_that_is_no_time(shell: Shell) -> None:
    ended = shell("wait", "job", "--timeout", "soon")
    assert ended.code == 2
    assert "'soon' is not a time" in ended.err


@pytest.mark.parametrize("command", [["wait", "job"], ["watch", "job"], ["results", "job", "--follow"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_leave_the_job_alone(shell: Shell, command: list[str], number: signal.Signals) -> None:
    shell.queue.submit(rows=10)
    shell.queue.run(shards=1)
    process = shell.start(*command)
    until_open(process, "jobs.db")
    process.send_signal(number)
    ended = end(process)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "interrupted: job job goes on"
    assert shell.queue.store.job("job").status == "in_progress"


def test_wait_in_a_process_sees_the_end(shell: Shell) -> None:
    shell.queue.submit(rows=10)
    process = shell.start("wait", "job", "--json", "--timeout", "1m")
    until_open(process, "jobs.db")
    shell.queue.run()
    ended = end(process)
    assert ended.code == 0
    assert json.loads(ended.out)["status"] == "completed"
    assert ended.err == "job job is completed: 10 rows\n"


def test_watch_says_what_happens(shell: Shell) -> None:
    shell.queue.submit(rows=10)
    process = shell.start("watch", "job")
    until_open(process, "jobs.db")
    shell.queue.run(fail={"r3"})
    ended = end(process)
    assert ended.code == 3
    assert ended.out == ""
    events = [event.what for event in shell.queue.store.events("job")]
    assert all(any(what in line for line in ended.err.splitlines()) for what in events)
    assert ended.err.splitlines()[-1] == "job job is completed: 10 rows, 1 failed"


def test_watch_as_json(shell: Shell) -> None:
    shell.queue.submit(rows=4)
    shell.queue.run()
    ended = shell("watch", "job", "--json")
    assert [json.loads(line)["status"] for line in ended.out.splitlines()] == ["completed"]


def test_following_to_stdout(shell: Shell) -> None:
    """Each line is there before the next one is committed."""
    shell.queue.submit(rows=8)
    process = shell.start("results", "job", "--follow", "-o", "-")
    assert process.stdout is not None
    got = list[str]()
    for fail in ({"r2"}, {"r5"}):
        claim = shell.queue.claim()
        assert claim is not None
        for position in range(4):
            (_, line) = shell.queue.store.read_shard("job", claim.lease.shard)[position]
            shell.queue.commit(claim, [position], fail=fail)
            if json.loads(line)["id"] not in fail:
                got.append(json.loads(process.stdout.readline())["custom_id"])
                assert got[-1] == json.loads(line)["id"]
    ended = end(process)
    assert ended.code == 3
    assert ended.out == ""
    assert len(got) == 6
    assert "6 answered; 2 failed; --errors-only prints them" in ended.err


def test_following_into_a_file(shell: Shell, tmp_path: Path) -> None:
    shell.queue.submit(rows=10)
    shell.queue.run(shards=1, fail={"r2"})
    process = shell.start("results", "job", "--follow", "-o", "out.jsonl")
    part, out = tmp_path / "out.jsonl.part", tmp_path / "out.jsonl"
    eventually(lambda: part.exists() and part.read_text().count("\n") == 4)
    assert ids(part) == ["r0", "r2", "r4", "r6"], "as they were committed, failed ones too"
    shell.queue.run()
    assert end(process).code == 3
    assert ids(out) == [f"r{row}" for row in (0, 1, 3, 4, 5, 6, 7, 8, 9)]
    assert ids(tmp_path / "out.errors.jsonl") == ["r2"]
    assert not part.exists()


def test_an_interrupted_follow_says_where_its_rows_are(shell: Shell, tmp_path: Path) -> None:
    shell.queue.submit(rows=10)
    shell.queue.run(shards=1)
    process = shell.start("results", "job", "--follow", "-o", "out.jsonl")
    part = tmp_path / "out.jsonl.part"
    eventually(lambda: part.exists() and part.read_text().count("\n") == 4)
    process.send_signal(signal.SIGINT)
    ended = end(process)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == f"interrupted: job job goes on; the rows so far are in {part}"
    assert ids(part) == ["r0", "r2", "r4", "r6"]


def test_a_reader_of_stdout_that_leaves(shell: Shell) -> None:
    shell.queue.submit(rows=4000, shard_rows=500)
    shell.queue.run(text="long" * 200)
    process = shell.start("results", "job")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert process.stderr.read() == "Error: stdout was closed before all rows were written\n"
    process.stderr.close()


def test_cancel_says_what_is_kept(shell: Shell) -> None:
    shell.queue.submit(rows=10)
    shell.queue.run(shards=1)
    ended = shell("cancel", "job", "--json")
    assert (ended.code, json.loads(ended.out)["status"]) == (0, "cancelled")
    assert "4 of 10 rows are finished and kept" in ended.err
    again = shell("cancel", "job")
    assert (again.code, again.out) == (0, "")
    assert again.err == "job job is cancelled: 4 of 10 rows; there is nothing to cancel\n"


def test_cancel_of_a_job_that_runs(shell: Shell) -> None:
    shell.queue.submit(rows=10)
    claim = shell.queue.claim()
    assert claim is not None
    assert "is being cancelled: 0 of 10 rows" in shell("cancel", "job").err
    shell.queue.commit(claim, [0, 1])
    shell.queue.store.release(claim.lease)
    assert shell("wait", "job").code == 5


def test_list_is_newest_first(shell: Shell) -> None:
    for number in range(3):
        shell.queue.submit(f"job{number}", rows=2, input_name=f"in{number}.jsonl")
    lines = shell("list").out.splitlines()
    assert [line.split()[0] for line in lines] == ["id", "job2", "job1", "job0"]
    each = [json.loads(line) for line in shell("list", "--json", "--limit", 2).out.splitlines()]
    assert [job["id"] for job in each] == ["job2", "job1"]


def test_status_of_a_job_that_waits_and_one_that_runs(shell: Shell) -> None:
    shell.queue.submit(rows=10, priority=3, metadata={"team": "a\x1b[31mb"})
    waiting = shell("status", "job")
    assert waiting.code == 0
    assert waiting.out.startswith("job job is in progress: 0 of 10 rows\n")
    assert "no worker" in waiting.out
    assert "\x1b" not in waiting.out
    shell.queue.hello()
    assert "w1" in shell("status", "job").out
    claim = shell.queue.claim()
    assert claim is not None
    shell.queue.commit(claim, [0, 1])
    running = shell("status", "job", "--json")
    said = json.loads(running.out)
    assert said["holders"] == {"w1": 1}
    assert said["shard_states"] == {"leased": 1, "ready": 2}
    assert said["rows_per_s"] > 0
    assert said["eta_s"] > 0
    assert "held by   w1 (cpu on here, ready): 1 shards" in shell("status", "job").out


def test_retries_and_their_answers_in_place(shell: Shell, tmp_path: Path) -> None:
    shell.queue.publish()
    shell.queue.submit(rows=10, invalid=1, priority=2, seed=7)
    shell.queue.run(fail={"r2", "r5", "r7"})
    asked = shell("retry", "job", "--failed-only")
    assert asked.code == 0, asked.err
    first = asked.out.strip()
    spec = shell.queue.store.job(first).spec
    assert (spec.retry_of, spec.priority, spec.seed) == ("job", 2, 7)
    shell.queue.run(fail={"r5"}, text="second")
    second = json.loads(shell("retry", first, "--json").out)
    assert (second["rows"], second["retry_of"]) == (1, first)
    shell.queue.run(text="third")
    ended = shell("results", "job", "--with-retries", "-o", "out.jsonl")
    assert ended.code == 3, "the invalid line has no answer"
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"r{row}" for row in range(9)]
    texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}
    assert (texts["r1"], texts["r2"], texts["r5"], texts["r7"]) == ("answer row 1", "second", "third", "second")
    assert ids(tmp_path / "out.errors.jsonl") == ["r9"]
    assert "was retried before" in shell("retry", "job").err


def test_retry_of_what_never_ran(shell: Shell, tmp_path: Path) -> None:
    shell.queue.publish()
    shell.queue.submit(rows=10)
    shell.queue.run(shards=1, fail={"r4"})
    shell.queue.store.cancel("job")
    asked = shell("retry", "job", "--json")
    assert json.loads(asked.out)["rows"] == 7
    shell.queue.run()
    assert shell("results", "job", "--with-retries", "-o", "out.jsonl").code == 0
    assert ids(tmp_path / "out.jsonl") == [f"r{row}" for row in range(10)]


def test_nothing_to_retry(shell: Shell) -> None:
    shell.queue.submit(rows=3)
    shell.queue.run()
    ended = shell("retry", "job")
    assert (ended.code, ended.out) == (0, "")
    assert ended.err == "job job is completed: 3 rows; there is nothing to retry\n"
    assert len(shell.queue.store.jobs()) == 1


def test_a_job_that_goes_on_is_not_retried(shell: Shell) -> None:
    shell.queue.submit(rows=3)
    ended = shell("retry", "job")
    assert ended.code == 4
    assert "only a job that has ended can be retried" in ended.err
