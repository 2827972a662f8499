"""The doctor finds what is there, and what is wrong, and dies of nothing."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loramill.kernels.native import operators
from loramill.kernels.native_lora import NativeLora
from loramill.producer import doctor, doctor_engine
from loramill.producer.cli import main
from loramill.producer.doctor import State
from loramill.producer.doctor_engine import operator_error
from loramill.worker.lora import DenseLora
from tests.producer.queued import Queue


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["doctor", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return int(end.value.code or 0), said.out


def test_one_screen_of_what_works(capsys: pytest.CaptureFixture[str], tiny_base: Path, tiny_adapters: Path) -> None:
    code, out = run(capsys, "--base-model", tiny_base, "--adapters-dir", tiny_adapters)
    lines = out.splitlines()
    assert code == 0
    assert len(lines) <= 24
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    for what in (
        "python",
        "packages",
        "disk",
        "programs",
        "store",
        "device",
        "triton",
        "native",
        "kernel",
        "base",
        "adapter",
    ):
        assert any(line.split()[1] == what for line in lines), what
    assert f"torch {torch.__version__}" in out


def test_the_store_and_its_workers(capsys: pytest.CaptureFixture[str], queue: Queue) -> None:
    queue.submit(rows=10)
    code, out = run(capsys, "--store", queue.url, "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True)
    said = {(one["what"], one["state"]): one["said"] + one["advice"] for one in found["findings"]}
    assert "10 rows to do" in said["store", "ok"]
    assert "3 shards wait" in said["workers", "warn"]
    queue.hello()
    _, out = run(capsys, "--store", queue.url)
    assert "w1: cpu on here, ready" in out


@pytest.mark.parametrize(
    ("store", "state", "code"),
    [("sqlite:///{}/new.db", "warn", 0), ("sqlite:///{}/no/folder.db", "fail", 1), ("nonsense", "fail", 1)],
)
def test_stores_that_are_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, store: str, state: str, code: int
) -> None:
    ended, out = run(capsys, "--store", store.format(tmp_path))
    assert ended == code
    assert [line.split()[0] for line in out.splitlines() if line.split()[1] == "store"] == [state]


def test_models_that_cannot_be_served(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "broken").mkdir()
    ended, out = run(capsys, "--base-model", tiny_base, "--adapter", f"bad={tmp_path}/broken")
    assert ended == 1
    assert any(line.startswith("fail  adapter    bad: ") for line in out.splitlines())
    ended, out = run(capsys, "--base-model", tmp_path / "gone")
    assert ended == 1
    assert any(line.startswith("fail  models     --base-model") for line in out.splitlines())


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    ended, out = run(capsys, "--device", "cuda")
    assert ended == 1
    assert "fail  device     --device cuda: torch" in out


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ended, out = run(capsys, "--output-folder", tmp_path / "gone")
    assert ended == 1
    assert f"fail  disk       {tmp_path}/gone: No such file" in out


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("triton", "celery", "torch"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    states = {one.said.split()[0]: one.state for one in doctor.packages() if one.state is not State.OK}
    assert states == {"torch": State.FAIL, "triton": State.WARN, "celery": State.WARN}


def test_without_torch_the_rest_is_said() -> None:
    """As a process in which torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None\nfrom loramill.producer.cli import main\nmain(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    states = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
    assert (states["python"], states["disk"], states["device"], states["kernel"]) == ("ok", "ok", "fail", "fail")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("compiled", [True, False])
def test_the_operator_is_exact_here(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr("loramill.kernels.native.operators", lambda: None)
    assert operator_error(torch.device("cpu")) < 1e-6


@pytest.mark.parametrize("slots", [DenseLora, NativeLora])
def test_a_wrong_operator_is_seen(monkeypatch: pytest.MonkeyPatch, slots: type[DenseLora | NativeLora]) -> None:
    if slots is NativeLora and operators() is None:
        pytest.skip("there is no C++ compiler here")
    if slots is DenseLora:
        monkeypatch.setattr("loramill.kernels.native.operators", lambda: None)
    monkeypatch.setattr(slots, "add", lambda *operands: None)
    (finding,) = doctor_engine.kernel("cpu")
    assert finding.state is State.FAIL


@pytest.mark.parametrize("unit", [False, True])
def test_it_says_whether_the_matrix_unit_is_used(monkeypatch: pytest.MonkeyPatch, unit: bool) -> None:
    if operators() is None:
        pytest.skip("there is no C++ compiler here")
    monkeypatch.setattr("loramill.kernels.native.matrix_unit", lambda: unit)
    (finding,) = doctor_engine.native()
    assert finding.state is State.OK
    assert ("AMX" in finding.said) == unit


@pytest.mark.parametrize(("setting", "advice"), [(None, "install g++"), ("0", "unset it")])
def test_operators_that_are_not_compiled(monkeypatch: pytest.MonkeyPatch, setting: str | None, advice: str) -> None:
    if setting is not None:
        monkeypatch.setenv("LORAMILL_NATIVE", setting)
    monkeypatch.setattr("loramill.kernels.native.operators", lambda: None)
    (finding,) = doctor_engine.native()
    assert (finding.what, finding.state) == ("native", State.WARN)
    assert advice in finding.advice
