"""What `python -m bench.operations` measures and shows, on a small shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.job import Spec
from bench.operations import OPERATIONS, by_operation, bytes_of_pass
from bench.report import render


def test_every_operation_of_both_engines_is_timed_and_shown(tmp_path: Path) -> None:
    out = tmp_path / "operations.json"
    options = ["--layers", "1", "--rows", "8", "--repeats", "2", "--dir", str(tmp_path / "cache"), "--out", str(out)]
    arguments = [sys.executable, "-m", "bench.operations", *options]
    done = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    for seconds in result["seconds"].values():
        assert set(seconds) == {"prefill", "decode"}
        assert all(set(phase) == {*OPERATIONS.values(), "rest"} for phase in seconds.values())
        assert all(one > 0 for phase in seconds.values() for one in phase.values())
    assert result["read_bytes_s"] > 1e8
    assert len(result["rounds_s"]) == 2
    for name, seconds in result["seconds"].items():
        least = sum(sum(phase.values()) for phase in seconds.values())
        assert all(least <= one[name] * (1 + 1e-9) for one in result["rounds_s"])
    made = render("<!-- bench:operations -->\n<!-- /bench -->\n", [result])
    assert made.count("| decode | gate, up |") == 1
    assert "the ratios of 2 rounds" in made
    assert "8 rows over 16 adapters" in made


def test_operations_are_summed_by_phase() -> None:
    passes = [("prefill", 1.0), ("decode", 2.0), ("decode", 3.0)]
    least = {(phase, number, 0, "attention"): seconds for number, (phase, seconds) in enumerate(passes)}
    assert by_operation(least) == {"prefill": {"attention": 1.0}, "decode": {"attention": 5.0}}


def test_a_pass_reads_each_weight_once_and_each_adapter() -> None:
    spec = Spec()
    found = bytes_of_pass(spec)
    linear = 2 * 768 * 768 + 2 * 768 * 256 + 3 * 768 * 2048
    assert found["weights"] == 2 * (12 * linear + 32768 * 768)
    assert found["low_rank"] == 2 * 12 * 16 * 16 * (4 * 768 + 2 * (768 + 256) + 3 * (768 + 2048))
    assert found["keys_values"] == 2 * 12 * 128 * (147 + 32) * 2 * 256
