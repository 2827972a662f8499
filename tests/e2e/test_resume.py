"""Runs that end early, and the same command again."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable

import pytest

from loramill.store.journal import DoneRow, Journal
from loramill.worker import loading

# Makes every step last, and says on stderr what each commit made durable.
SLOW = """
import sys, time
from loramill.store.journal import Journal
from loramill.worker.engine import Engine
step, commit = Engine.step, Journal.commit
def slow(self, on_start):
    time.sleep(0.03)
    return step(self, on_start)
def told(self, rows):
    rows = list(rows)
    commit(self, rows)
    print("COMMITTED", *(row.row for row in rows), file=sys.stderr, flush=True)
Engine.step, Journal.commit = slow, told
"""
FEW = ("--max-num-seqs", "4", "--max-num-batched-tokens", "64")


@pytest.fixture
def no_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the weights must not be loaded")

    monkeypatch.setattr(loading, "Engine", refuse)


def committed(process: subprocess.Popen[str], at_least: int) -> set[int]:
    """Waits until so many rows are durable; those that are."""
    rows: set[int] = set()
    assert process.stderr is not None
    while len(rows) < at_least:
        line = process.stderr.readline()
        assert line, f"it ended with {process.wait()} too early"
        if line.startswith("COMMITTED"):
            rows |= set(map(int, line.split()[1:]))
    return rows


def told(err: str) -> set[int]:
    lines = [line for line in err.splitlines() if line.startswith("COMMITTED")]
    return {int(row) for line in lines for row in line.split()[1:]}


@pytest.mark.parametrize("seed", range(3))
def test_kill_minus_nine_at_a_random_moment_loses_no_committed_row(desk, rows, monkeypatch, seed: int) -> None:
    chance = random.Random(seed)
    desk.write(rows(60))
    process = desk.start(*FEW, before=SLOW)
    durable = committed(process, chance.choice((1, 8, 20, 35)))
    time.sleep(chance.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    durable |= told(desk.end(process).err)
    assert not desk.output.exists()

    redone: set[int] = set()
    commit = Journal.commit

    def noted(journal: Journal, some: Iterable[DoneRow]) -> None:
        some = list(some)
        redone.update(row.row for row in some)
        commit(journal, some)

    monkeypatch.setattr(Journal, "commit", noted)
    again = desk.run("--json", *FEW)
    assert again.code == 0, again.err
    assert not redone & durable, "no finished row is done again"
    assert again.summary["resumed"] == 60 - len(redone) >= len(durable)
    assert [result["custom_id"] for result in desk.results()] == [f"r{number}" for number in range(60)]
    assert desk.files() == {"out.jsonl"}


def test_the_answers_of_a_resumed_run_are_those_of_an_unbroken_one(desk, rows) -> None:
    desk.write(rows(40, temperature=1.0))
    process = desk.start(*FEW, before=SLOW)
    committed(process, 8)
    process.send_signal(signal.SIGKILL)
    desk.end(process)
    assert desk.run().code == 0
    broken = [result["response"]["body"]["choices"] for result in desk.results()]
    assert desk.run("--overwrite").code == 0
    assert [result["response"]["body"]["choices"] for result in desk.results()] == broken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_rows_in_flight_and_the_same_command_resumes(desk, rows, number) -> None:
    desk.write(rows(60))
    process = desk.start("--json", *FEW, before=SLOW)
    before = committed(process, 4)
    process.send_signal(number)
    ended = desk.end(process)
    assert ended.code == 130, ended.err
    assert not ended.out
    assert "Traceback" not in ended.err
    kept = before | told(ended.err)
    assert len(kept) < 60
    last = ended.err.splitlines()[-1]
    assert last == f"interrupted: {len(kept)} of 60 rows are done and kept; the same command resumes"
    assert desk.files() == {"out.jsonl.journal"}
    again = desk.run("--json")
    assert again.code == 0
    assert again.summary["resumed"] == len(kept)
    assert len(desk.results()) == 60


def test_a_second_interrupt_ends_it_at_once(desk, rows) -> None:
    desk.write(rows(8, max_tokens=200, ignore_eos=True))  # 200 slow steps: draining would take 6 s and more
    process = desk.start("--max-num-seqs", "8", before=SLOW)
    assert process.stderr is not None
    while "loading the base" not in process.stderr.readline():
        pass
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    while "once more to stop at once" not in process.stderr.readline():
        pass
    asked_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    ended = desk.end(process)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert time.monotonic() - asked_s < 4
    assert desk.run().code == 0
    assert len(desk.results()) == 8


@pytest.mark.parametrize("after_s", [0.2, 0.5, 1.2, 2.5])
def test_an_interrupt_before_any_compute(desk, after_s: float) -> None:
    ready = "import sys, loramill.producer.cli; print('READY', file=sys.stderr, flush=True)"
    process = desk.start("--input", "-", before=ready, stdin=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()
    time.sleep(after_s)  # amid torch's import, transformers' (both have swallowed one), or the wait for stdin
    process.send_signal(signal.SIGINT)
    ended = desk.end(process)
    assert ended.code == 130
    assert ended.err.strip().startswith("interrupted")
    assert "Traceback" not in ended.err
    assert not desk.files()


@pytest.fixture
def half_done(desk, rows):
    """A job of 24 rows of which some are in the journal."""
    desk.write(rows(24))
    process = desk.start(*FEW, before=SLOW)
    committed(process, 4)
    process.send_signal(signal.SIGKILL)
    desk.end(process)
    return desk


def test_a_journal_of_another_job_is_refused_with_what_changed(half_done, rows, make_adapter, no_compute) -> None:
    desk = half_done
    for flags, changed in (
        ({"seed": 5}, "--seed changed since"),
        ({"limit": 23}, "--limit changed since"),
        ({"dtype": "bfloat16"}, "--dtype changed since"),
        ({"max_model_len": 128}, "--max-model-len changed since"),
    ):
        ended = desk.run(**flags)
        assert ended.code == 4
        assert ended.err.endswith(f"was made by another job: {changed}; pass --overwrite to start afresh\n")
    desk.write(rows(25))
    ended = desk.run()
    assert ended.code == 4
    assert ended.err.count("\n") == 1
    assert "input changed since" in ended.err


def test_an_adapter_that_changed_is_noticed_and_one_that_no_row_names_is_not(half_done, make_adapter, tmp_path) -> None:
    desk = half_done
    others = shutil.copytree(desk.adapters, tmp_path / "others")
    make_adapter(others / "unnamed", seed=9)
    shutil.rmtree(others / "two")
    make_adapter(others / "two", seed=99)
    ended = desk.run(adapters_dir=others)
    assert ended.code == 4
    assert "adapter `two` changed since;" in ended.err
    shutil.rmtree(others / "two")
    shutil.copytree(desk.adapters / "two", others / "two")
    ended = desk.run("--json", adapters_dir=others)
    assert ended.code == 0
    assert ended.summary["resumed"] > 0


def test_overwrite_resumes_the_same_job_and_starts_another_afresh(half_done) -> None:
    desk = half_done
    ended = desk.run("--overwrite", "--json", seed=3)
    assert (ended.code, ended.summary["resumed"]) == (0, 0)
    assert len(desk.results()) == 24


def test_overwrite_resumes_its_own_journal(half_done) -> None:
    desk = half_done
    desk.output.write_text("of an earlier run")
    ended = desk.run()
    assert ended.code == 2, "half a journal does not explain an output"
    ended = desk.run("--overwrite", "--json")
    assert ended.code == 0
    assert ended.summary["resumed"] >= 4


@pytest.mark.parametrize("content", [b"no database" * 100, b""])
def test_a_damaged_journal(desk, rows, content: bytes) -> None:
    desk.write(rows(2))
    desk.journal.write_bytes(content)
    ended = desk.run()
    if content:
        assert ended.code == 1
        assert ended.err.count("\n") == 1
        assert "is damaged" in ended.err
        assert "--overwrite" in ended.err
        assert desk.run("--overwrite").code == 0
    else:
        assert ended.code == 0, "killed before its first byte, it is as good as none"


def test_the_same_command_twice_at_once(desk, rows) -> None:
    desk.write(rows(40))
    first = desk.start(*FEW, before=SLOW)
    committed(first, 1)
    second = desk.run()
    assert second.code == 1
    assert second.err.count("\n") == 1
    assert "another process is at this job" in second.err
    assert desk.end(first).code == 0
    assert len(desk.results()) == 40


KILLED = {
    "before the error file": "from loramill.producer import outputs; outputs._assemble = lambda *_, **__: os._exit(9)",
    "between the error file and the output": (
        "from loramill.producer import outputs; assemble = outputs._assemble\n"
        "outputs._assemble = lambda *a, failed: assemble(*a, failed=failed) if failed else os._exit(9)"
    ),
    "in the middle of the output": (
        "from loramill.producer import outputs; from loramill.store.journal import Journal; lines = Journal.lines\n"
        "def torn(self, failed):\n"
        "    for line in lines(self, failed=failed):\n"
        "        if b'r5' in line: os._exit(9)\n"
        "        yield line\n"
        "Journal.lines = torn"
    ),
    "between the output and the end of the journal": (
        "from loramill.store.journal import Journal; Journal.delete = lambda self: os._exit(9)"
    ),
}


@pytest.mark.parametrize("when", KILLED)
def test_killed_while_the_files_are_put_in_place(desk, rows, no_compute, when: str) -> None:
    desk.write([*rows(7), "not json"])
    killed = desk.end(desk.start("--on-invalid", "skip", before="import os\n" + KILLED[when]))
    assert killed.code == 9, killed.err
    assert desk.output.exists() == (when == "between the output and the end of the journal")
    ended = desk.run("--on-invalid", "skip", "--json")
    assert ended.code == 3, ended.err
    assert ended.summary["resumed"] == 8
    assert len(desk.results()) == 7
    assert len(desk.results(desk.errors)) == 1
    assert desk.files() == {"out.jsonl", "out.errors.jsonl"}
    assert desk.run("--on-invalid", "skip").code == 2, "now it is an output like any other"


def test_a_disk_that_fills_up_while_rows_are_committed(desk, rows) -> None:
    desk.write(rows(300))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))"
    ended = desk.end(desk.start("--quiet", *FEW, before=limit))
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("Error: cannot write the journal ")
    assert "what is committed stays, and the same command resumes" in ended.err
    assert not desk.output.exists()
    again = desk.run("--json")
    assert again.code == 0
    assert again.summary["resumed"] > 0
    assert len(desk.results()) == 300


def test_a_disk_that_fills_up_while_the_output_is_written(desk, rows, no_compute) -> None:
    desk.write(rows(30))
    limit = """
import resource
from loramill.producer import run_here as run
publish = run.publish
def full(*given):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    publish(*given)
run.publish = full
"""
    ended = desk.end(desk.start("--quiet", before=limit))
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert "out.jsonl: File too large" in ended.err
    # Nor can SQLite fold its log into the database then; the rows in it are safe all the same.
    assert desk.files() - {"out.jsonl.journal-wal"} == {"out.jsonl.journal"}
    assert desk.run().code == 0
    assert len(desk.results()) == 30
