import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from loramill.store.errors import JournalBusy, JournalDamaged, JournalMismatch, StoreError
from loramill.store.journal import DoneRow, Journal, Totals

IDENTITY = {"input": "a", "base model": "b", "adapter `sql`": "c", "--seed": "0"}


def row(number: int, failed: bool = False, size: int = 20) -> DoneRow:
    line = b'{"row":%d,"pad":"%s"}' % (number, b"x" * size)
    return DoneRow(number, failed, line, prompt_tokens=3, completion_tokens=number)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.journal"


def test_rows_come_back_in_row_order_whatever_the_order_of_commits(path: Path) -> None:
    journal = Journal(path, IDENTITY)
    journal.commit([row(7), row(2, failed=True, size=5000)])
    journal.commit([row(0, size=5000), row(3, failed=True)])
    assert list(journal.lines(failed=False)) == [row(0, size=5000).line, row(7).line]
    assert list(journal.lines(failed=True)) == [row(2, size=5000).line, row(3).line]
    assert np.flatnonzero(journal.done(9)).tolist() == [0, 2, 3, 7]
    assert journal.totals() == Totals(done=4, failed=2, prompt_tokens=12, completion_tokens=12)
    journal.close()


def test_reopening_keeps_every_row_and_the_first_result_of_each(path: Path) -> None:
    first = Journal(path, IDENTITY)
    first.commit([row(1)])
    first.close()
    again = Journal(path, IDENTITY)
    again.commit([row(1, failed=True, size=99), row(2)])
    assert list(again.lines(failed=False)) == [row(1).line, row(2).line]
    assert not list(again.lines(failed=True))
    again.delete()
    assert not list(path.parent.iterdir())


def test_an_empty_journal_has_nothing_done(path: Path) -> None:
    journal = Journal(path, IDENTITY)
    assert journal.totals() == Totals(0, 0, 0, 0)
    assert not journal.done(5).any()
    journal.close()


def test_a_journal_without_rows_is_nobodys(path: Path) -> None:
    Journal(path, {"input": "another"}).close()
    Journal(path, IDENTITY).close()
    journal = Journal(path, IDENTITY)
    journal.commit([row(0)])
    journal.close()
    with pytest.raises(JournalMismatch):
        Journal(path, {"input": "another"})


def test_a_decision_stays_as_it_was_made_and_goes_with_its_job(path: Path) -> None:
    journal = Journal(path, IDENTITY)
    journal.decide({"a": "static", "b": "dynamic"})
    journal.decide({"a": "dynamic", "c": "static"})
    journal.close()
    again = Journal(path, IDENTITY)
    assert again.decisions() == {"a": "static", "b": "dynamic", "c": "static"}
    again.close()
    other = Journal(path, {**IDENTITY, "input": "other"})
    assert other.decisions() == {}, "nobody's rows, so nobody's decisions"
    other.close()


def test_another_job_is_refused_with_each_part_that_differs(path: Path) -> None:
    first = Journal(path, IDENTITY)
    first.commit([row(0)])
    first.close()
    other = {"input": "A", "base model": "b", "--seed": "0", "adapter `new`": "d"}
    with pytest.raises(JournalMismatch) as refused:
        Journal(path, other)
    assert sorted(refused.value.changed) == ["adapter `new` is new", "adapter `sql` is gone", "input changed since"]
    Journal(path, IDENTITY).close()  # the refusal held no lock and changed nothing


def test_a_second_process_is_told_that_one_is_at_it(path: Path) -> None:
    journal = Journal(path, IDENTITY)
    code = f"""
        from pathlib import Path
        from loramill.store.journal import Journal
        try: Journal(Path({str(path)!r}), {IDENTITY!r})
        except Exception as error: print(type(error).__name__, error)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("JournalBusy another process is at this job")
    journal.commit([row(0)])  # the first is not disturbed
    journal.close()


def test_the_same_process_cannot_open_it_twice(path: Path) -> None:
    journal = Journal(path, IDENTITY)
    with pytest.raises(JournalBusy):
        Journal(path, IDENTITY)
    journal.close()


@pytest.mark.parametrize("attempt", range(3))
def test_kill_minus_nine_loses_no_row_whose_commit_returned(path: Path, attempt: int) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from loramill.store.journal import DoneRow, Journal
        journal = Journal(Path({str(path)!r}), {IDENTITY!r})
        for start in range(0, 10**9, 5):
            journal.commit([DoneRow(n, n % 3 == 0, b'{{"row":%d,"pad":"%s"}}' % (n, b"x" * (n % 2000)))
                            for n in range(start, start + 5)])
            print(start + 5, flush=True)
    """
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(random.Random(attempt).uniform(0.05, 0.4))
    writer.send_signal(signal.SIGKILL)
    promised = int((writer.stdout.read().split() or ["5"])[-1])
    writer.wait()
    writer.stdout.close()
    journal = Journal(path, IDENTITY)
    total = journal.totals().done
    assert total >= promised
    assert total % 5 == 0, "a commit is all or none"
    assert journal.done(total).all()
    assert list(journal.lines(failed=True)) == [
        b'{"row":%d,"pad":"%s"}' % (n, b"x" * (n % 2000)) for n in range(0, total, 3)
    ]
    journal.close()


def test_a_process_killed_while_creating_it_leaves_a_usable_journal(path: Path) -> None:
    # What SQLite leaves when it dies after the WAL switch and before the first transaction: a header and no tables.
    bare = sqlite3.connect(path)
    bare.execute("PRAGMA journal_mode=WAL")
    bare.close()
    journal = Journal(path, IDENTITY)
    journal.commit([row(0)])
    journal.close()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 4096])
def test_a_damaged_journal_is_one_clear_sentence(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(JournalDamaged, match=r"out\.jsonl\.journal is damaged: "):
        Journal(path, IDENTITY)


def test_a_damaged_line_is_one_clear_sentence(path: Path) -> None:
    Journal(path, IDENTITY).close()
    raw = sqlite3.connect(path)
    with raw:
        raw.execute("INSERT INTO rows VALUES (0, 0, ?, 0, 0)", (b"\x28\xb5\x2f\xfd broken",))
    raw.close()
    journal = Journal(path, IDENTITY)
    with pytest.raises(JournalDamaged):
        list(journal.lines(failed=False))
    journal.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot open the journal"):
        Journal(tmp_path / "no" / "out.journal", IDENTITY)


def test_a_full_disk_keeps_what_is_committed_and_the_next_run_goes_on(path: Path) -> None:
    code = f"""
        import resource
        from pathlib import Path
        from loramill.store.errors import StoreError
        from loramill.store.journal import DoneRow, Journal
        journal = Journal(Path({str(path)!r}), {IDENTITY!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # the kernel refuses to let a file grow past it
        done = 0
        try:
            while True:
                journal.commit([DoneRow(done, False, bytes(300) + b"%d" % done)])
                done += 1
        except StoreError as error:
            print(done, error)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    promised, message = said.stdout.split(" ", 1)
    assert message.startswith("cannot write the journal ")
    journal = Journal(path, IDENTITY)
    assert journal.totals().done == int(promised) > 50
    journal.commit([row(10**6)])
    journal.close()


def test_memory_does_not_grow_with_the_rows(path: Path) -> None:
    code = f"""
        import resource
        from pathlib import Path
        from loramill.store.journal import DoneRow, Journal
        journal = Journal(Path({str(path)!r}), {IDENTITY!r})
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line = b"y" * 400
        write = lambda some: [journal.commit([DoneRow(n, False, line) for n in range(s, s + 500)]) for s in some]
        write(range(0, 20_000, 500)); sum(1 for _ in journal.lines(failed=False)); before = peak()
        write(range(20_000, 120_000, 500)); sum(1 for _ in journal.lines(failed=False)); journal.done(120_000)
        print(peak() - before)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(said.stdout) * unit < 16 * 2**20  # 100,000 lines of 400 bytes are 40 MB
