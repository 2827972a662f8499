"""`loramill run --devices`: several engines, each a process of its own, fed from one queue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loramill.producer import run_devices
from loramill.worker.engine_process import CHILD
from tests.e2e.conftest import Desk
from tests.e2e.test_worker import alive, descendants
from tests.worker.queueing import ENVIRONMENT, until

# A child whose steps last; that it dies once, where it is told so. Where a folder is there to meet in, none makes its
# first step before two have rows.
SLOW_CHILD = """
import os, sys, time
from pathlib import Path
from loramill.worker import child
from loramill.worker.engine import Engine
step, dies, meet = Engine.step, Path(sys.argv[1]), Path(sys.argv[2])
def slow(self, *given):
    if meet.exists():
        (meet / str(os.getpid())).touch()
        while len(list(meet.iterdir())) < 2:
            time.sleep(0.01)
    time.sleep(0.03)
    done = step(self, *given)
    if dies.exists():
        dies.unlink()
        os.abort()
    return done
Engine.step = slow
child.main()
"""
# Says on stderr what each commit made durable.
TELLS = """
import sys
from loramill.producer.run_queue import RunQueue
commit = RunQueue.commit
def told(self, lease, chunk):
    done = commit(self, lease, chunk)
    print("COMMITTED", *chunk.index["row"].tolist(), file=sys.stderr, flush=True)
    return done
RunQueue.commit = told
"""
FEW = ("--max-num-seqs", "4", "--max-num-batched-tokens", "64")


class Devices(Desk):
    """The desk, with two engines on the CPU unless told otherwise."""

    @property
    def queue(self) -> Path:
        return self.folder / "out.jsonl.queue"

    @property
    def dies(self) -> Path:
        """An engine that sees this file dies."""
        return self.folder.parent / f"{self.folder.name}-dies"

    @property
    def meet(self) -> Path:
        """If this folder is there, an engine that has rows waits until another has some too."""
        return self.folder.parent / f"{self.folder.name}-meet"

    def arguments(self, *more: object, **instead: object) -> list[str]:
        return super().arguments(*more, **{"device": None, "devices": "cpu,cpu", **instead})


@pytest.fixture
def desk(
    tmp_path: Path,
    tiny_base: Path,
    tiny_adapters: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Devices:
    (tmp_path / "desk").mkdir()
    desk = Devices(tmp_path / "desk", tiny_base, tiny_adapters, capsys)
    (tmp_path / "slow_child.py").write_text(SLOW_CHILD)
    monkeypatch.setenv(CHILD, f"{sys.executable} {tmp_path / 'slow_child.py'} {desk.dies} {desk.meet}")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return desk


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no engine must be started")

    monkeypatch.setattr(run_devices, "EngineProcess", refuse)


def committed(process: subprocess.Popen[str], at_least: int) -> set[int]:
    """Waits until so many rows are durable; those that are."""
    rows: set[int] = set()
    assert process.stderr is not None
    while len(rows) < at_least:
        line = process.stderr.readline()
        assert line, f"it ended with {process.wait()} too early"
        rows |= told(line)
    return rows


def told(err: str) -> set[int]:
    lines = [line for line in err.splitlines() if line.startswith("COMMITTED")]
    return {int(row) for line in lines for row in line.split()[1:]}


def answers(desk: Desk) -> list[tuple[str, Any]]:
    return [(one["custom_id"], one["response"]["body"]["choices"]) for one in desk.results()]


def test_two_engines_come_to_what_one_does(desk: Devices, rows: Any, make_adapter: Any, tmp_path: Path) -> None:
    adapters = tmp_path / "some"
    adapters.mkdir()
    for entry in desk.adapters.iterdir():
        (adapters / entry.name).symlink_to(entry)
    desk.adapters = tmp_path / "adapters"
    adapters.rename(desk.adapters)
    for name in ("one", "two", "three"):
        (desk.adapters / name).unlink()
        make_adapter(desk.adapters / name, seed=ord(name[0]))
    make_adapter(desk.adapters / "large", rank=128)
    bad = [{"id": "of-large", "adapter": "large", "prompt": "x"}, "not json"]
    desk.write([*rows(100, temperature=1.0), *rows(0), *bad])
    one = desk.run("--on-invalid", "skip", device="cpu", devices=None)
    assert one.code == 3, one.err
    expected, errors = answers(desk), desk.errors.read_text().count("\n")

    desk.meet.mkdir()
    ended = desk.run("--on-invalid", "skip", "--json", "--overwrite", "--pin", "two")
    assert ended.code == 3, ended.err
    assert answers(desk) == expected
    assert desk.errors.read_text().count("\n") == errors == 2
    assert desk.files() == {"out.jsonl", "out.errors.jsonl"}
    summary = ended.summary
    assert (summary["rows"], summary["failed"], summary["invalid"], summary["resumed"]) == (102, 2, 2, 0)
    assert set(summary["rows_by_device"]) == {"cpu:0", "cpu:1"}
    assert sum(summary["rows_by_device"].values()) == 100
    assert all(summary["rows_by_device"].values()), "both had a part"
    assert summary["adapter_loads"] >= 3
    assert summary["completion_tokens_per_s"] > 0
    assert "loading the base on cpu:0, cpu:1" in ended.err
    assert "worker " not in ended.err


def test_kill_minus_nine_loses_no_committed_row(desk: Devices, rows: Any) -> None:
    desk.write(rows(80))
    process = desk.start(*FEW, before=TELLS)
    durable = committed(process, 8)
    engines = descendants(process.pid)
    assert len(engines) >= 2
    process.send_signal(signal.SIGKILL)
    durable |= told(desk.end(process).err)
    until(lambda: not any(alive(pid) for pid in engines), 10)
    assert desk.files() >= {"out.jsonl.journal", "out.jsonl.queue"}

    began_s = time.monotonic()
    process = desk.start("--json", *FEW, before=TELLS)
    again = desk.end(process)
    assert again.code == 0, again.err
    assert not told(again.err) & durable, "no finished row is done again"
    assert again.summary["resumed"] == 80 - len(told(again.err)) >= len(durable)
    assert time.monotonic() - began_s < 60, "what the dead one had leased is not waited for"
    assert [result["custom_id"] for result in desk.results()] == [f"r{number}" for number in range(80)]
    assert desk.files() == {"out.jsonl"}


def test_an_interrupt_keeps_what_is_done_for_the_same_command_and_no_other(desk: Devices, rows: Any) -> None:
    desk.write(rows(80))
    process = desk.start("--json", *FEW, before=TELLS)
    before = committed(process, 4)
    second = desk.run()
    assert second.code == 1
    assert second.err.count("\n") == 1
    assert "another process is at this job" in second.err
    process.send_signal(signal.SIGINT)
    ended = desk.end(process, 20)
    assert ended.code == 130, ended.err
    assert not ended.out
    assert "Traceback" not in ended.err
    kept = before | told(ended.err)
    assert 0 < len(kept) < 80
    last = ended.err.splitlines()[-1]
    assert last == f"interrupted: {len(kept)} of 80 rows are done and kept; the same command resumes"
    assert desk.files() - {"out.jsonl.queue-journal"} == {"out.jsonl.journal", "out.jsonl.queue"}

    for given, said in (
        ({"seed": 3}, "--seed changed since"),
        ({"device": "cpu", "devices": None}, "it was begun with --devices and can only go on so, not without"),
    ):
        other = desk.run(**given)
        assert other.code == 4
        assert other.err.count("\n") == 1
        assert said in other.err
        assert "--overwrite" in other.err
    explained = desk.run("--explain", "--json")
    assert explained.code == 0, explained.err
    assert sum(wave["rows"] for wave in json.loads(explained.out)["waves"]) == 80 - len(kept)
    # Another number of devices is the same job: its rows do not depend on where they are run.
    again = desk.run("--json", devices="cpu")
    assert again.code == 0, again.err
    assert again.summary["resumed"] == len(kept)
    assert again.summary["rows_by_device"] == {"cpu:0": 80 - len(kept)}
    assert desk.files() == {"out.jsonl"}
    resumed = answers(desk)
    assert desk.run("--overwrite", device="cpu", devices=None).code == 0
    assert answers(desk) == resumed


def test_a_terminals_interrupt_amid_loading(desk: Devices, rows: Any) -> None:
    """It reaches every process of the group, and those that still import libraries know of no signal yet."""
    desk.write(rows(8))
    process = desk.start("--json", start_new_session=True)
    until(lambda: len(descendants(process.pid)) >= 2, 60)
    os.killpg(process.pid, signal.SIGINT)
    ended = desk.end(process, 20)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert ended.err.endswith("interrupted: 0 of 8 rows are done and kept; the same command resumes\n")


def test_a_journal_of_a_run_without_devices(desk: Devices, rows: Any) -> None:
    desk.write(rows(30))
    # Killed after its first rows.
    dies = "import os\nfrom loramill.store.journal import Journal\ncommit = Journal.commit\n"
    dies += "def once(self, rows):\n    rows = list(rows)\n    commit(self, rows)\n    rows and os._exit(9)\n"
    code = f"{dies}Journal.commit = once\nfrom loramill.producer.cli import main\n"
    code += f"main({desk.arguments(*FEW, device='cpu', devices=None)!r})"
    assert subprocess.run([sys.executable, "-c", code], cwd=desk.folder, capture_output=True).returncode == 9
    refused = desk.run()
    assert refused.code == 4
    assert "it was begun without --devices and can only go on so, not with" in refused.err
    ended = desk.run("--overwrite", "--json")
    assert (ended.code, ended.summary["resumed"]) == (0, 0), ended.err
    assert len(desk.results()) == 30
    assert desk.files() == {"out.jsonl"}


def test_an_engine_that_dies_is_started_again(desk: Devices, rows: Any) -> None:
    desk.write(rows(80))
    process = desk.start("--json", *FEW, before=TELLS)
    committed(process, 4)
    desk.dies.touch()
    ended = desk.end(process)
    assert ended.code == 0, ended.err
    assert "died (signal 6)" in ended.err
    assert ended.summary["failed"] == 0
    assert len(desk.results()) == 80


KILLED = {
    "before the output": "run_devices.assemble = lambda *_: os._exit(9)",
    "after it": "from loramill.store.journal import Journal; Journal.delete = lambda self: os._exit(9)",
}


@pytest.mark.parametrize("when", KILLED)
def test_killed_while_the_files_are_put_in_place(desk: Devices, rows: Any, when: str, no_engine: None) -> None:
    desk.write([*rows(20), "not json"])
    before = "import os\nfrom loramill.producer import run_devices\n" + KILLED[when]
    killed = desk.end(desk.start("--on-invalid", "skip", before=before))
    assert killed.code == 9, killed.err
    assert desk.output.exists() == (when == "after it")
    ended = desk.run("--on-invalid", "skip", "--json")
    assert ended.code == 3, ended.err
    assert ended.summary["resumed"] == 21
    assert len(desk.results()) == 20
    assert desk.files() == {"out.jsonl", "out.errors.jsonl"}


# How much of a queue still goes on the disk once the job is in it.
FILLS_UP = """
import resource
from loramill.producer import run_devices
put_job = run_devices.put_job
def full(queue, *given):
    done = put_job(queue, *given)
    limit = queue.info().used_bytes + ROOM
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return done
run_devices.put_job = full
"""


@pytest.mark.parametrize("room", [1000, 90_000])
def test_a_disk_that_fills_up(desk: Devices, rows: Any, room: int) -> None:
    desk.write(rows(400))
    ended = desk.end(desk.start("--quiet", *FEW, before=FILLS_UP.replace("ROOM", str(room)) + TELLS))
    assert ended.code == 1, ended.err
    assert bool(told(ended.err)) == (room > 1000)
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"Error: cannot write the store {desk.queue}: its disk, or what it may use of it, is full;")
    assert last.endswith("what is committed stays, and the same command resumes")
    if room > 1000:
        again = desk.run("--json")
        assert again.code == 0, again.err
        assert again.summary["resumed"] >= len(told(ended.err))
        assert len(desk.results()) == 400


def test_an_engine_of_another_model(desk: Devices, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its files had been changed after the job was checked."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    desk.write(rows(4))
    ended = desk.run("--quiet")
    assert ended.code == 4
    assert ended.err.count("\n") == 1
    assert "another model than the job was checked with" in ended.err
    assert not desk.output.exists()


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"devices": "gpu"}, 2, "--devices gpu: it is all, or some of"),
        ({"devices": "cpu,"}, 2, "it is all, or some of"),
        ({"devices": "all,cpu"}, 2, "it is all, or some of"),
        ({"devices": "cuda:0,cuda:0"}, 2, "cuda:0 is there twice"),
        ({"devices": "cuda:77"}, 1, "GPU"),
        ({"device": "cpu"}, 2, "--device and --devices do not go together"),
        ({"lora_mode": "static"}, 2, "--lora-mode static and --devices do not go together"),
        ({"order": "input"}, 2, "--order input and --devices do not go together"),
    ],
)
def test_devices_that_cannot_be(
    desk: Devices, rows: Any, no_engine: None, given: dict[str, object], code: int, said: str
) -> None:
    desk.write(rows(2))
    ended = desk.run(**given)
    assert ended.code == code
    assert ended.err.count("\n") == 1
    assert said in ended.err
    assert desk.files() == set()


def test_invalid_lines_are_refused_before_anything_is_stored(desk: Devices, rows: Any, no_engine: None) -> None:
    desk.write([*rows(3), "not json"])
    ended = desk.run()
    assert ended.code == 4
    assert "nothing was run" in ended.err
    assert desk.files() == set()


def test_a_file_that_is_no_queue(desk: Devices, rows: Any, no_engine: None) -> None:
    desk.write(["not json"])
    desk.queue.write_bytes(b"no database" * 100)
    ended = desk.run("--on-invalid", "skip")
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert "it is not a database; pass --overwrite to start afresh" in ended.err
    assert desk.run("--on-invalid", "skip", "--overwrite").code == 3
    assert desk.files() == {"out.jsonl", "out.errors.jsonl"}
