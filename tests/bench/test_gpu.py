"""`make gpu` where there is no device, and what its parts import: only what a lent GPU has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ROOT, gpu_engine
from bench.gpu import TESTS, count
from bench.gpu_report import section
from bench.job import Spec
from bench.parts import describe_part, save_part, slug
from bench.peers.engine import EngineRunner
from bench.peers.hugging_face import PeftMixed, Transformers

ABSENT = ("hypothesis", "pydantic", "orjson", "click", "rich", "celery", "redis", "zstandard", "openai", "matplotlib")
BLOCKER = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": "src", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize(
    ("module", "part"), [("gpu", "all"), ("kernels", "kernels"), ("gpu_engine", "engine"), ("gpu tests", "tests")]
)
def test_without_a_device_it_says_so_in_one_line(module: str, part: str) -> None:
    done = run(sys.executable, "-m", *f"bench.{module}".split())
    assert done.returncode == 1
    assert done.stderr == f"gpu: {part} wants a CUDA device, and torch sees none here\n"


@pytest.mark.parametrize(
    "code",
    [
        "import bench.gpu, bench.kernels, bench.gpu_engine, bench.peers.vllm_kernels, bench.peers.sglang_kernels, "
        "loramill.kernels.on_device, loramill.kernels.tune",
        f"import pytest; sys.exit(pytest.main(['--collect-only', '-qq', '-W', 'default', '-p', 'no:cacheprovider', "
        f"'-p', 'no:hypothesispytest', '-p', 'no:schemathesis', '--ignore=tests/kernels/test_aot.py', *{TESTS!r}]))",
    ],
    ids=["parts", "tests"],
)
def test_nothing_is_imported_that_a_lent_gpu_has_not(code: str) -> None:
    done = run(sys.executable, "-c", BLOCKER + code)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if "collect" in code:
        for name in ("test_triton.py", "test_multi_lora.py", "test_graphs.py", "test_engine.py"):
            assert name in done.stdout


def test_counts_of_a_report() -> None:
    report = '<testsuites><testsuite tests="7" skipped="2" failures="1" errors="1"/><testsuite tests="3"/></testsuites>'
    assert count(report) == {"passed": 6, "failed": 2, "skipped": 2}


def test_results_are_named_after_device_and_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    monkeypatch.setenv("OUT", str(tmp_path))
    path = save_part(describe_part("kernels", ["python"]) | {"device": "NVIDIA A100-SXM4-80GB"})
    assert path == tmp_path / "nvidia-a100-sxm4-80gb-kernels.json"
    assert json.loads(path.read_text())["versions"]["torch"]


SMALL = Spec(
    layers=1, rows=6, hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=512, adapters=3, prompt_tokens=9,
    output_tokens=5,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses names that transformers has deprecated
def test_the_engine_part_with_its_device_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_engine, "no_device", lambda _: False)
    monkeypatch.setattr(gpu_engine, "SPEC", SMALL)
    few = [(Transformers(batch_rows=4), 6), (EngineRunner(0, "cpu", 4), 6), (EngineRunner(2, "cpu", 4), 6)]
    monkeypatch.setattr(gpu_engine, "runners", lambda _: [*few, (PeftMixed(batch_rows=4), 4)])
    assert gpu_engine.main(["--dir", str(tmp_path / "cache")]) == 0
    (file,) = (tmp_path / "out").iterdir()
    found = json.loads(file.read_text())
    ours = found["runners"]["loramill-2"]
    assert ours["rows"] == 6
    assert ours["details"]["adapter_loads"] >= 3, "what was loaded for the warm-up is not there any more"
    assert ours["output_tokens_per_s"] == pytest.approx(6 * 5 / ours["run_s"])
    assert ours["agreement"]["first"] >= 0.5
    assert found["runners"]["loramill-base"]["agreement"]["first"] >= 0.5
    assert "| PEFT, mixed batch | 4 |" in section([found])
