"""`make gpu` where there is no device, and what its parts import: only what a lent GPU has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ROOT, gpu_engine, gpu_job, gpu_peers
from bench.gpu import TESTS, count
from bench.gpu_report import section
from bench.job import Spec
from bench.parts import describe_part, save_part, slug
from bench.peers.engine import EngineRunner
from bench.peers.hugging_face import PeftMixed, Transformers
from bench.points import Ceilings

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
    ("module", "part"),
    [("gpu", "all"), ("kernels", "kernels"), ("gpu_engine", "engine"), ("gpu_peers", "peers"), ("gpu tests", "tests")],
)
def test_without_a_device_it_says_so_in_one_line(module: str, part: str) -> None:
    done = run(sys.executable, "-m", *f"bench.{module}".split())
    assert done.returncode == 1
    assert done.stderr == f"gpu: {part} wants a CUDA device, and torch sees none here\n"


@pytest.mark.parametrize(
    "code",
    [
        "import bench.gpu, bench.kernels, bench.gpu_engine, bench.gpu_peers, bench.peers.vllm_kernels, "
        "bench.peers.sglang_kernels, loramill.kernels.on_device, loramill.kernels.tune, "
        "loramill.kernels.attention_triton, loramill.kernels.layer_triton, loramill.worker.graphs",
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


def test_a_floor_is_the_larger_of_bytes_and_operations() -> None:
    slow_copy, slow_gemm = Ceilings(1e6, 1e15), Ceilings(1e15, 1e6)
    weights = 512 * 64 + (64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64)
    found = gpu_engine.floor(SMALL, 4, 10, slow_copy)
    assert found["bytes"] == 2 * weights + 4 * 10 * 2 * 2 * 16 * 2
    assert found["floor_s"] == found["bytes"] / 1e6
    assert gpu_engine.floor(SMALL, 4, 10, slow_gemm)["floor_s"] == (2 * 4 * weights + 4 * 4 * 10 * 64) / 1e6


def test_the_engine_part_with_its_device_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    for name, value in {"SPEC": SMALL, "ROUNDS": 2, "DECODE_ROWS": (2, 3), "DECODE_TOKENS": 5}.items():
        monkeypatch.setattr(gpu_engine, name, value)
    monkeypatch.setattr(gpu_job, "WARM_ROWS", 4)
    monkeypatch.setattr(gpu_engine, "no_device", lambda _: False)
    monkeypatch.setattr(gpu_engine, "limits", lambda _: Ceilings(1e10, 1e11))
    monkeypatch.setattr(gpu_engine, "runners", lambda _: [EngineRunner(0, "cpu", 4), EngineRunner(2, "cpu", 4)])
    assert gpu_engine.main(["--dir", str(tmp_path / "cache")]) == 0
    (file,) = (tmp_path / "out").iterdir()
    found = json.loads(file.read_text())
    ours = found["runners"]["loramill-2"]
    assert len(ours["run_s"]) == len(found["runners"]["loramill-base"]["run_s"]) == 2
    assert ours["repeats"] == [1.0, 1.0]
    assert ours["details"]["adapter_loads"] >= 1, "three adapters over two slots"
    assert [(one["name"], one["rows"]) for one in found["decode"]] == [
        (name, rows) for rows in (2, 3) for name in ("loramill-base", "loramill-2")
    ]
    assert all(one["passes"] == 4 and 0 < one["outside"] < 1 and one["of_floor"] > 0 for one in found["decode"])
    text = section([found])
    assert "own no-LoRA decode step" in text
    assert "| loramill, 2 slots | 3 |" in text


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses names that transformers has deprecated
def test_the_peers_part_with_its_device_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_job, "WARM_ROWS", 4)
    monkeypatch.setattr(gpu_peers, "no_device", lambda _: False)
    monkeypatch.setattr(gpu_peers, "SPEC", SMALL)
    monkeypatch.setattr(gpu_peers, "REFERENCES", {False: "transformers", True: "peft-mixed"})
    few = [(Transformers(batch_rows=4), 6), (EngineRunner(0, "cpu", 4), 6), (EngineRunner(2, "cpu", 4), 6)]
    monkeypatch.setattr(gpu_peers, "runners", lambda _: [*few, (PeftMixed(batch_rows=4), 4)])
    assert gpu_peers.main(["--dir", str(tmp_path / "cache")]) == 0
    (file,) = (tmp_path / "out").iterdir()
    found = json.loads(file.read_text())
    ours = found["runners"]["loramill-2"]
    assert ours["rows"] == 6
    assert ours["output_tokens_per_s"] == pytest.approx(6 * 5 / ours["run_s"])
    assert ours["agreement"]["first"] >= 0.5
    assert found["runners"]["loramill-base"]["agreement"]["first"] >= 0.5
    assert "| PEFT, mixed batch | 4 |" in section([found])
