"""The harness end to end on a small shape: `python -m bench` with the product and one peer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench import ROOT


def test_a_small_job_is_run_checked_and_written(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--layers", "1", "--rows", "2", "--repeats", "1", "--dir", str(tmp_path / "cache"), "--out", str(out)]
    command = [sys.executable, "-m", "bench", *options, "--runners", "loramill", "peft-mixed"]
    # One thread: with more, a busy neighbour makes every barrier wait for the scheduler.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["runners"]) == {"loramill", "peft-mixed"}
    assert len(result["ratios"]["loramill / peft-mixed"]["rounds"]) == 1
    assert result["hardware"]["threads"] == 1
    agreed = result["runners"]["loramill"]["agreement"]
    assert agreed["tokens"] > 0
    assert "| PEFT, mixed batch |" in done.stdout
