"""The process's memory: what is free, and keeping what torch gives back."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

_PRODUCTS = 128
"""How many of oneDNN's products to keep: of some twenty numbers of rows (`lora.compiled_rows`) with six shapes of
weights. Each takes half a megabyte, and compiled amid what passes allocate it tears the memory that is kept for those:
with a product for every number of rows, 10,000 short rows of the tiny model took 620 MB with 128 of them kept and 535
with 24, which were then compiled over and over; with few numbers of rows 128 take 517."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # from glibc's malloc.h


def free_memory(device: str) -> int:
    """Bytes free for us: on the device, or of the machine and the control group that we run in."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or no limit in it
    return max(free, 0)


_SHORT = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether this is about memory: a smaller pass may do."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in _SHORT)


def give_back(device: str) -> None:
    """Return to the device what torch keeps of it for later, so that it can be cut otherwise."""
    if device == "cuda":
        torch.cuda.empty_cache()


def lazy_zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`count` zeros; on a CPU in pages of their own, which take no memory until they are written."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def keep_freed_memory() -> None:
    """Have the C library keep large freed blocks for the next tensor, where it is glibc.

    By default each activation of a prefill is mapped anew, and faulting its pages in takes longer than computing it:
    on two cores, 8192 tokens through a 100M-parameter Qwen2 took 8.5 s, and 5.0 s with this. All threads share what is
    kept, so that adapters are read into what loading the base has freed. The process then gives memory back only when
    it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**26)
        mallopt(_M_ARENA_MAX, 1)


def keep_few_products() -> None:
    """Have oneDNN and torch's layer over it forget the products compiled longest ago, unless somebody has set how many
    they keep. It is read before the first product of this process.

    They compile one for every shape of weights and number of rows, which takes a millisecond, and keep each, at half a
    megabyte, up to 1024 of them. Numbers of rows in prefills rarely come again.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PRODUCTS))
