"""The harness end to end on a small shape: `python -m bench` with the product and one peer; and its order of rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import ROOT, command, rounds
from bench.job import Spec, prepare
from bench.peers.vllm import Vllm
from bench.rounds import measure


def test_a_small_job_is_run_checked_and_written(tmp_path: Path) -> None:
    out = tmp_path / "results"
    options = ["--layers", "1", "--rows", "2", "--repeats", "1", "--dir", str(tmp_path / "cache"), "--out", str(out)]
    names = ["loramill", "loramill-16", "peft-mixed", "vllm-16"]
    arguments = [sys.executable, "-m", "bench", *options, "--points", "main", "growth-1000", "--runners", *names]
    # One thread: with more, a busy neighbour makes every barrier wait for the scheduler.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH_VLLM_PYTHON": str(tmp_path / "none")}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "main.json").read_text())
    assert set(result["runners"]) == {"loramill-16", "peft-mixed"}
    assert len(result["ratios"]["loramill-16 / peft-mixed"]["rounds"]) == 1
    assert result["hardware"]["threads"] == 1
    assert "BENCH_VLLM_PYTHON" in result["absent"]["vllm-16"]
    agreed = result["runners"]["loramill-16"]["agreement"]
    assert agreed["tokens"] > 0
    assert "| PEFT, mixed batch |" in done.stdout
    assert "| vllm-16 | absent: not installed" in done.stdout
    grown = json.loads((out / "growth-1000.json").read_text())
    assert grown["job"]["tiny"]
    assert grown["runners"]["loramill"]["peak_bytes"][0] > 50e6


def race(name: str, round_s: float, log: list[str], clock: list[float]) -> Any:
    one = SimpleNamespace(name=name, measured={"x": 1}, round_s=0.0)

    def run() -> None:
        clock[0] += round_s
        one.round_s = round_s
        log.append(name)

    one.round = run
    return one


def test_rounds_go_over_all_points_and_none_begins_that_would_pass_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log, kept, said = [0.0], [], [], []
    monkeypatch.setattr(rounds.time, "monotonic", lambda: clock[0])
    races = [race("long", 200.0, log, clock), race("short", 10.0, log, clock)]
    measure(races, 3, 4, said.append, lambda one: kept.append(one.name))
    assert log == kept == ["long", "short", "short", "short"]
    assert said == [f"long: no round {number} of 3: it would pass 4 minutes" for number in (2, 3)]


def test_memory_is_that_of_the_process_and_its_children_together() -> None:
    child = "import time; x = b'1' * (60 << 20); time.sleep(1)"
    parent = f"import subprocess, sys; x = b'1' * (60 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    code, most = command._wait(process.pid)
    process.returncode = code
    assert code == 0
    assert 120 << 20 < most < 300 << 20


def test_a_tiny_job_is_the_example_s_model(tmp_path: Path) -> None:
    job = prepare(Spec(tiny=True, rows=12, adapters=4, prompt_tokens=9), tmp_path)
    assert job.base == ROOT / "examples" / "tiny" / "base"
    assert {row.adapter for row in job.rows()} <= {one.name for one in job.adapters.iterdir()}
    assert not (job.folder / "base").exists()


def test_a_peer_that_is_not_installed_is_absent_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_VLLM_PYTHON", str(tmp_path / "python"))
    assert "make bench-peers" in str(Vllm().absent())
    monkeypatch.setenv("BENCH_VLLM_PYTHON", sys.executable)
    assert "vllm is not installed" in str(Vllm(4).absent())
