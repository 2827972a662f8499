"""Which regime, blocks and splits a shape gets: measured where a plan file says so, sound everywhere else. No triton.

A plan file is JSON, made by `python -m loramill.kernels.tune` on the device it is for:

    {"device": "NVIDIA H200", "triton": "3.6.0", "entries": [{"height": 16, "rows": 64, "rank": 16, "k": 4096,
      "n": 6144, "dtype": "bfloat16", "regime": "grouped", "splits": 4, "shrink": 0, "expand": 1}]}

`shrink` and `expand` are places in the lists of `blocks`. LORAMILL_KERNEL_PLAN names the file; without it the user's
cache folder is looked into, under the device's name and Triton's version.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from loramill.kernels.blocks import HEIGHTS, Blocks, expand_blocks, shrink_blocks

VARIABLE = "LORAMILL_KERNEL_PLAN"
MAX_SPLITS = 16
PROGRAMS = 264
"""Programs that fill a device: two for each of a H100's or H200's 132 multiprocessors."""
ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Regime(StrEnum):
    """How a call is computed."""

    GROUPED = "grouped"
    """Tiles of rows of one mix."""
    ROWS = "rows"
    """Programs of its own for each row."""
    ALL_SLOTS = "all_slots"
    """One product against every resident A, then the grouped expand."""


@dataclass(slots=True, frozen=True)
class Shape:
    """What decides: the tiles' height (16 for decode), rows, R, K, N and the dtype's name."""

    height: int
    rows: int
    rank: int
    k: int
    n: int
    dtype: str

    @property
    def shrink_blocks(self) -> tuple[Blocks, ...]:
        return shrink_blocks(self.height, ITEMSIZES[self.dtype])

    @property
    def expand_blocks(self) -> tuple[Blocks, ...]:
        return expand_blocks(self.height, ITEMSIZES[self.dtype])


@dataclass(slots=True, frozen=True)
class Launch:
    """A decision: the regime, the parts K is split into, and places in the shape's lists of blocks."""

    regime: Regime
    splits: int
    shrink: int
    expand: int


@dataclass(slots=True, frozen=True)
class Entry:
    """A decision that was measured for a shape."""

    shape: Shape
    launch: Launch


@dataclass(slots=True, frozen=True)
class Plan:
    """Measured decisions for one device; without any, the defaults decide."""

    entries: tuple[Entry, ...] = ()

    def launch(self, shape: Shape, tiles: int, columns: int) -> Launch:
        """The decision for a shape that takes `tiles` tiles and `columns` columns of bridge.

        A measured one holds for the same height, K, N and dtype, ranks up to the measured one and no less than half of
        it, and likewise rows: of several, the nearest from above.
        """
        fitting = [entry for entry in self.entries if _covers(entry.shape, shape)]
        if fitting:
            return min(fitting, key=lambda entry: (entry.shape.rank, entry.shape.rows)).launch
        return default_launch(shape, tiles, columns)


def _covers(measured: Shape, shape: Shape) -> bool:
    same = (measured.height, measured.k, measured.n, measured.dtype) == (shape.height, shape.k, shape.n, shape.dtype)
    return same and shape.rank <= measured.rank <= 2 * shape.rank and shape.rows <= measured.rows <= 2 * shape.rows


def tile_height(rows: int, mixes: int) -> int:
    """How high tiles are to be: low where rows of a mix are few (decode), high where they are many (prefill)."""
    mean = rows / max(1, mixes)
    return 16 if mean < 32 else 64 if mean < 512 else 128


def default_launch(shape: Shape, tiles: int, columns: int) -> Launch:
    """The fallback, right everywhere and measured nowhere: widest blocks that the columns fill, K split until the
    device is full."""
    shrinks, expands = shape.shrink_blocks, shape.expand_blocks
    shrink = max(place for place, blocks in enumerate(shrinks) if place == 0 or blocks.n <= columns)
    expand = max(place for place, blocks in enumerate(expands) if place == 0 or blocks.k <= shape.rank)
    k_blocks = -(-shape.k // shrinks[shrink].k)
    programs = max(1, tiles) * -(-columns // shrinks[shrink].n)
    splits = max(1, min(PROGRAMS // programs, k_blocks // 2, MAX_SPLITS))
    regime = Regime.ROWS if shape.rows <= 4 else Regime.GROUPED
    return Launch(regime, splits, shrink, expand)


def default_path(device: str, triton: str) -> Path:
    """Where a device's plan is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "loramill", "kernels", re.sub(r"[^a-z0-9.]+", "-", f"{device} {triton}".lower()) + ".json")


def load_plan(device: str, triton: str) -> Plan:
    """The plan for a device: the file that LORAMILL_KERNEL_PLAN names, the one in the cache, or none.

    Raises:
        ValueError: the file cannot be read, does not hold a plan, or is for another device or Triton.
    """
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else default_path(device, triton)
    if not named and not path.exists():
        return Plan()
    try:
        found = json.loads(path.read_text())
        made_for = found["device"], found["triton"]
        plan = Plan(tuple(_entry(one) for one in found["entries"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"kernel plan {path} cannot be used ({error}); make it again or unset {VARIABLE}") from error
    if made_for != (device, triton):
        raise ValueError(
            f"kernel plan {path} is for {made_for[0]} with Triton {made_for[1]}, not {device} with Triton {triton}; "
            f"make one here or unset {VARIABLE}"
        )
    return plan


def save_plan(path: Path, device: str, triton: str, entries: Sequence[Entry]) -> None:
    """Write a plan file."""
    rows = [asdict(entry.shape) | asdict(entry.launch) for entry in entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "triton": triton, "entries": rows}, indent=1) + "\n")


def _entry(found: dict[str, Any]) -> Entry:
    names = [field.name for field in fields(Shape)]
    shape = Shape(**{name: found[name] for name in names})
    launch = Launch(Regime(found["regime"]), found["splits"], found["shrink"], found["expand"])
    numbers = [*(getattr(shape, name) for name in names if name != "dtype"), launch.splits]
    if not all(isinstance(number, int) and number > 0 for number in numbers) or shape.dtype not in ITEMSIZES:
        raise ValueError(f"an entry's shape must be positive numbers and a dtype of {list(ITEMSIZES)}: {found}")
    if shape.height not in HEIGHTS:
        raise ValueError(f"height must be one of {HEIGHTS}: {found}")
    if launch.splits > MAX_SPLITS:
        raise ValueError(f"splits must be at most {MAX_SPLITS}: {found}")
    for name, listed in (("shrink", shape.shrink_blocks), ("expand", shape.expand_blocks)):
        if found[name] not in range(len(listed)):
            raise ValueError(f"{name} must be a place in a list of {len(listed)} blocks: {found}")
    return Entry(shape, launch)
