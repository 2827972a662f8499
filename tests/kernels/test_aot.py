"""Every program that can be launched compiles ahead of time for every architecture, fits, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.kernels.compile_variants import LISTS

SHARED_MEMORY = {"cuda 80": 163 << 10, "cuda 90": 227 << 10, "cuda 100": 227 << 10, "hip gfx942": 64 << 10}
"""Bytes of shared memory that one program may have."""
PARTS = 2
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def programs() -> list[dict[str, Any]]:
    """What each program takes, from processes where the interpreter is not asked for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(REPO / ".cache" / "triton")
    script = Path(__file__).with_name("compile_variants.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, str(part), str(PARTS)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for part in range(PARTS)
    ]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * PARTS
    return [json.loads(line) for lines in said for line in lines.splitlines()]


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_all_of_them_compile_and_fit(programs: list[dict[str, Any]], target: str) -> None:
    mine = [program for program in programs if program["target"] == target]
    listed = [v for of in LISTS for v in of(target.startswith("hip"))]
    assert Counter(p["kernel"] for p in mine) == Counter(v.kernel.function.__name__ for v in listed)
    assert [program for program in mine if program["shared"] > SHARED_MEMORY[target]] == []


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_none_of_them_spills(programs: list[dict[str, Any]], target: str) -> None:
    mine = [program for program in programs if program["target"] == target]
    if any(program["spills"] is None for program in mine):
        pytest.skip("this Triton comes without cuobjdump and ptxas")
    assert mine
    assert [program for program in mine if program["spills"]] == []
