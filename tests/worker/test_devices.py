"""Which device a worker takes, without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.devices import Device, count_devices, parse_listing, take_devices, take_each, visible

LISTING = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa-1)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb-2)
  MIG 1g.18gb     Device  0: (UUID: MIG-cccc-3)
  MIG 1g.18gb     Device  1: (UUID: MIG-dddd-4)
GPU 2: NVIDIA H200 (UUID: GPU-eeee-5)
"""


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose `nvidia-smi -L` names two GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "GPU 0: X (UUID: GPU-aaaa)"\necho "GPU 1: X (UUID: GPU-bbbb)"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def taken_elsewhere(wanted: str) -> str:
    """What another process gets."""
    code = f"from loramill.worker.devices import take_devices as t; print([d.name for d in t({wanted!r})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_parts_of_a_gpu_take_its_place() -> None:
    assert parse_listing(LISTING) == ["GPU-aaaa-1", "MIG-cccc-3", "MIG-dddd-4", "GPU-eeee-5"]
    assert parse_listing("No devices found.\n") == []


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        (None, ["a", "b", "c"]),
        ("1", ["b"]),
        ("2, 0", ["c", "a"]),
        ("GPU-x,MIG-y", ["GPU-x", "MIG-y"]),
        ("", []),
        ("-1", []),
        ("0,-1,2", ["a"]),
    ],
)
def test_only_what_cuda_would_see(asked: str | None, left: list[str]) -> None:
    assert list(visible(asked, ["a", "b", "c"])) == left


def test_each_worker_takes_its_own(gpus: None) -> None:
    assert count_devices("all") == 2
    assert take_devices("cuda") == [Device("cuda:0", "cuda", {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"})]
    assert taken_elsewhere("auto") == "['cuda:1']"  # free again when that process ends
    assert "other workers of this machine have cuda:0" in taken_elsewhere("cuda:0")
    assert take_devices("all") == [Device("cuda:1", "cuda", {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"})]
    assert "have 2 of 2 GPUs" in taken_elsewhere("auto")
    assert take_devices("cpu") == [Device("cpu", "cpu")]


@pytest.mark.parametrize(
    ("wanted", "hidden", "code", "says"),
    [
        ("gpu", None, ExitCode.USAGE, "it is auto, cpu, cuda, cuda:N"),
        ("cuda:2", None, ExitCode.MACHINE, "there are 2 GPUs here"),
        ("cuda", "", ExitCode.MACHINE, "there is no GPU here"),
    ],
)
def test_what_cannot_be_had(
    wanted: str, hidden: str | None, code: ExitCode, says: str, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(Failure, match=says) as refused:
        take_devices(wanted)
    assert refused.value.code is code


def test_without_a_gpu_torch_chooses(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert take_devices("auto") == [Device("auto", "auto")]


def test_each_of_a_list(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    taken = take_each("cuda:1, cpu,cpu", "--devices")
    assert [(device.name, device.option) for device in taken] == [
        *(("cuda:1", "cuda"), ("cpu:0", "cpu"), ("cpu:1", "cpu")),
    ]
    assert [device.environment for device in taken] == [
        {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"},
        {"OMP_NUM_THREADS": "4"},
        {"OMP_NUM_THREADS": "4"},
    ]
    assert [device.name for device in take_each("all", "--devices")] == ["cuda:0"], "what is left"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [dict(device.environment) for device in take_each("cpu", "--devices")] == [{}]
    with pytest.raises(Failure, match="--devices cuda:0: other workers of this machine have cuda:0"):
        take_each("cuda:0", "--devices")
