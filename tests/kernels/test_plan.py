"""The plan: a measured decision where there is one, a sound one everywhere, and a bad file refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from loramill.kernels.blocks import HEIGHTS
from loramill.kernels.plan import (
    ITEMSIZES,
    MAX_SPLITS,
    Entry,
    Launch,
    Plan,
    Regime,
    Shape,
    default_launch,
    default_path,
    load_plan,
    save_plan,
    tile_height,
)
from loramill.kernels.tune import candidates, parse_shape

DEVICE = ("NVIDIA H200", "3.6.0")
SHAPE = Shape(16, 64, 16, 4096, 6144, "bfloat16")
MEASURED = Launch(Regime.ALL_SLOTS, 3, 1, 1)


@given(
    st.builds(
        Shape,
        st.sampled_from(HEIGHTS),
        st.integers(1, 10**5),
        st.integers(1, 256),
        st.integers(1, 30000),
        st.integers(1, 200000),
        st.sampled_from(sorted(ITEMSIZES)),
    ),
    st.integers(0, 10**5),
    st.integers(1, 4),
)
def test_every_shape_has_a_launch_from_the_lists(shape: Shape, tiles: int, siblings: int) -> None:
    launch = default_launch(shape, tiles, siblings * shape.rank)
    assert 0 <= launch.shrink < len(shape.shrink_blocks)
    assert 0 <= launch.expand < len(shape.expand_blocks)
    assert 1 <= launch.splits <= MAX_SPLITS
    assert launch.splits <= max(1, shape.k // shape.shrink_blocks[launch.shrink].k)


@given(st.integers(0, 10**6), st.integers(0, 10**4))
def test_heights_are_those_there_are(rows: int, mixes: int) -> None:
    assert tile_height(rows, mixes) in HEIGHTS


def test_a_measured_decision_holds_for_shapes_near_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    save_plan(path, *DEVICE, [Entry(SHAPE, MEASURED)])
    monkeypatch.setenv("LORAMILL_KERNEL_PLAN", str(path))
    plan = load_plan(*DEVICE)
    assert plan == Plan((Entry(SHAPE, MEASURED),))
    near = [SHAPE, Shape(16, 33, 8, 4096, 6144, "bfloat16")]
    far = [
        Shape(16, 65, 16, 4096, 6144, "bfloat16"),
        Shape(16, 64, 17, 4096, 6144, "bfloat16"),
        Shape(16, 64, 16, 4096, 6144, "float16"),
        Shape(64, 64, 16, 4096, 6144, "bfloat16"),
        Shape(16, 64, 16, 4095, 6144, "bfloat16"),
    ]
    assert [plan.launch(shape, 8, 48) for shape in near] == [MEASURED] * 2
    assert [plan.launch(shape, 8, 48) for shape in far] == [default_launch(shape, 8, 48) for shape in far]


def test_the_nearest_measurement_from_above_decides() -> None:
    other = Launch(Regime.GROUPED, 1, 0, 0)
    larger = Entry(Shape(16, 90, 16, 4096, 6144, "bfloat16"), other)
    assert Plan((larger, Entry(SHAPE, MEASURED))).launch(SHAPE, 8, 48) == MEASURED


def test_without_a_file_there_is_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAMILL_KERNEL_PLAN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_plan(*DEVICE) == Plan()
    save_plan(default_path(*DEVICE), *DEVICE, [Entry(SHAPE, MEASURED)])
    assert load_plan(*DEVICE).entries
    assert load_plan("AMD MI300X", DEVICE[1]) == Plan()


ENTRY = {"height": 16, "rows": 1, "rank": 1, "k": 1, "n": 1, "dtype": "bfloat16"}
ENTRY |= {"regime": "grouped", "splits": 1, "shrink": 0, "expand": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ('{"device": "NVIDIA H200", "triton": "3.6.0"}', "entries"),
        ({}, "KeyError|height"),
        (ENTRY | {"regime": "fast"}, "fast"),
        (ENTRY | {"height": 17}, "height must be one of"),
        (ENTRY | {"dtype": "int8"}, "dtype"),
        (ENTRY | {"rows": 0}, "positive"),
        (ENTRY | {"splits": "4"}, "positive"),
        (ENTRY | {"splits": 17}, "splits must be at most"),
        (ENTRY | {"shrink": 2}, "shrink must be a place"),
        (ENTRY | {"expand": -1}, "expand must be a place"),
    ],
)
def test_a_bad_file_is_refused(
    text: str | dict[str, object] | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    monkeypatch.setenv("LORAMILL_KERNEL_PLAN", str(path))
    if isinstance(text, dict):
        text = json.dumps({"device": DEVICE[0], "triton": DEVICE[1], "entries": [text]})
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_plan(*DEVICE)
    assert str(path) in str(raised.value)


def test_a_named_file_for_another_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    save_plan(path, *DEVICE, [])
    monkeypatch.setenv("LORAMILL_KERNEL_PLAN", str(path))
    with pytest.raises(ValueError, match=r"is for NVIDIA H200 with Triton 3\.6\.0, not NVIDIA H200 with Triton 3\.7"):
        load_plan("NVIDIA H200", "3.7.0")


@pytest.mark.parametrize("height", HEIGHTS)
def test_what_is_measured_is_what_a_plan_may_say(height: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(height, 64, 16, 4096, 6144, "bfloat16")
    entries = [Entry(shape, launch) for launch in candidates(shape)]
    assert {entry.launch.regime for entry in entries} >= {Regime.GROUPED, Regime.ALL_SLOTS}
    path = tmp_path / "plan.json"
    save_plan(path, *DEVICE, entries)
    monkeypatch.setenv("LORAMILL_KERNEL_PLAN", str(path))
    assert load_plan(*DEVICE).entries == tuple(entries)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to be measured")
def test_tuning_without_a_device_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "loramill.kernels.tune"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "tune: no CUDA device is here to be measured\n"


@pytest.mark.parametrize("shape", ["4096", "0:1", "8:1,1,1,1,1", "8:-1", "x:1"])
def test_a_shape_that_is_none_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match=r"shape is K|invalid literal"):
        parse_shape(shape)
