"""The operators for a CPU in C++, from `kernels/cpp`, compiled by the system's compiler when first asked for.

Where there is no compiler, or LORAMILL_NATIVE=0 says so, `operators` is None and the forms in plain torch serve. CXX
names another compiler. The library is kept in the user's cache folder, by sources, compiler and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).with_name("cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-strict-aliasing", "-Wno-psabi"),
    *("-fopenmp", "-fPIC", "-shared"),
)
SECONDS = 120
"""The most that compiling may take; it is about five."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LANES = 16
"""Sizes that are read in whole vectors must be multiples of this."""

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "add_rms_norm": [_P, _P, _L],
    "rope_store": [_P, _P, _L, _L],
    "gated": [_P, _P, _L, _I, _I],
    "largest": [_P, _L, _L, _I, _P, _P],
    "store": [_P, _L, _L, _P, _L, _L, _P, _P, _P, _L, _I, _I, _I, _I, _L, _L],
    "attend": [_P, _P, _L, _L, _P, _P, _P, _P, _P, _L, *[_I] * 7, _F, _F, _L, _L, _P, _L, _I],
    "multi_lora_step": [],
    "fill_panels": [_P, _L],
    "multi_lora": [_P, _P, _L],
    "multi_lora_normed": [_P, _P, _L, _P],
    "multi_lora_roped": [_P, _P, _L, _P],
    "multi_lora_gated": [_P, _P, _L, _P, _I],
}
_LOG = logging.getLogger(__name__)


def serves(*tensors: Tensor) -> bool:
    """Whether the native forms take these: on a CPU, all of one dtype that they know, and there is a library."""
    first = tensors[0]
    known = first.device.type == "cpu" and first.dtype in DTYPES
    return known and all(one.dtype is first.dtype for one in tensors) and operators() is not None


@cache
def function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """An operator for a dtype; tensors go in as their `data_ptr()`."""
    found = operators()
    if found is None:
        raise ValueError(f"there is no native {name} here")
    called: Any = getattr(found, f"{name}_{DTYPES[dtype]}")
    called.argtypes = _ARGUMENTS[name]
    called.restype = ctypes.c_int if name == "multi_lora_step" else None
    operator: Callable[..., int] = called
    return operator


@cache
def operators() -> ctypes.CDLL | None:
    """The compiled operators, or None."""
    if os.environ.get("LORAMILL_NATIVE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None:
        _LOG.warning("no C++ compiler (g++) is found: on a CPU the slower forms in plain torch serve")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        why = " ".join(str(said).split())[:300]
        _LOG.warning("the C++ operators cannot be built, the slower forms in plain torch serve: %s", why)
        return None


def matrix_unit() -> bool:
    """Whether operators in bfloat16 go by the processor's matrix unit (AMX): it has one, the system lets us use it, and
    LORAMILL_AMX=0 does not leave it out."""
    found = operators()
    return found is not None and bool(found.matrix_unit())


def _compiled(compiler: str) -> Path:
    """The library's file, made unless it is there."""
    sources = sorted(SOURCES.glob("*.cpp"))
    key = hashlib.sha256(repr((compiler, _version(compiler), FLAGS, _processor())).encode())
    for file in (*sources, *sorted(SOURCES.glob("*.h"))):
        key.update(file.name.encode() + file.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "loramill", "native")
    kept = folder / f"{key.hexdigest()[:24]}.so"
    if kept.exists():
        return kept
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as making:
        made = Path(making, "made.so")
        command = [compiler, *FLAGS, *map(str, sources), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        made.replace(kept)  # whole or not at all, whoever else makes it meanwhile
    return kept


def _version(compiler: str) -> str:
    asked = [compiler, "--version"]
    return subprocess.run(asked, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def _processor() -> str:
    """What `-march=native` looks at, as far as it can be told."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(("flags", "Features")))][:2])
