"""An adapter's safetensors, read once: checked, hashed and viewed as the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json"

_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class AdapterError(Exception):
    """An adapter that cannot be served; `problems` has every reason, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


@dataclass(slots=True, frozen=True)
class TensorFiles:
    """An adapter's tensors as they were at one moment."""

    tensors: dict[str, Tensor]
    """By name, as saved; views of the bytes that were read."""
    others: dict[str, str]
    """Names of tensors that are not floating point, with their dtype."""
    sha256: str
    """Over the config and every file of weights."""


def read_config(path: str) -> bytes:
    """What `adapter_config.json` holds.

    Raises:
        AdapterError: it is not there, or cannot be read.
    """
    if not Path(path).is_dir():
        raise AdapterError([f"{path}: no such folder"])
    try:
        return (Path(path) / CONFIG).read_bytes()
    except FileNotFoundError:
        raise AdapterError([f"{path}: no {CONFIG} in this folder"]) from None
    except OSError as error:
        raise AdapterError([f"{path}: {CONFIG} cannot be read: {error}"]) from error


def read(path: str, config: bytes) -> TensorFiles:
    """Read an adapter's tensors; `config` is the one that stands beside them.

    Raises:
        AdapterError: a file is missing, damaged, pickled, cut short, or says one thing twice.
    """
    folder = Path(path)
    digest = hashlib.sha256(hashlib.sha256(config).digest())
    tensors: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    problems: list[str] = []
    where: dict[str, str] = {}
    for file in _files(folder):
        try:
            data = _bytes(file)
            for name, dtype, tensor in _tensors(data):
                if name in where:
                    problems.append(f"{path}: {name} is in {where[name]} and in {file.name}: which one is meant?")
                where[name] = file.name
                if tensor is None:
                    others[name] = dtype
                else:
                    tensors[name] = tensor
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            problems.append(f"{path}: {file.name} is damaged or cut short: {error}")
            continue
        digest.update(hashlib.sha256(data).digest())
    if not problems:
        problems += [f"{path}: {problem}" for problem in _against_index(folder, where)]
    if problems:
        raise AdapterError(problems)
    return TensorFiles(tensors, others, digest.hexdigest())


def _files(folder: Path) -> list[Path]:
    """The file of weights, or all of its shards in order."""
    shards = {p.name: found for p in folder.glob("adapter_model-*.safetensors") if (found := _SHARD.fullmatch(p.name))}
    whole = folder / WEIGHTS
    if whole.is_file() and shards:
        raise AdapterError([f"{folder}: both {WEIGHTS} and {min(shards)} are in this folder: remove one"])
    if whole.is_file():
        return [whole]
    if not shards:
        pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
        why = f"; pickled weights ({', '.join(pickled)}) are never loaded, convert them" if pickled else ""
        raise AdapterError([f"{folder}: no {WEIGHTS} in this folder{why}"])
    counts = {int(found[2]) for found in shards.values()}
    count = max(counts)
    wanted = [f"adapter_model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if len(counts) > 1 or sorted(shards) != wanted:
        raise AdapterError([f"{folder}: of {count} shards only these are here: {', '.join(sorted(shards))}"])
    return [folder / name for name in wanted]


def _against_index(folder: Path, where: dict[str, str]) -> Iterator[str]:
    """What a sharded adapter's index promises and the shards do not keep."""
    if not (folder / INDEX).is_file():
        return
    try:
        promised = json.loads((folder / INDEX).read_bytes())["weight_map"]
        missing = sorted(name for name, file in promised.items() if where.get(name) != file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield f"{INDEX} cannot be read: {type(error).__name__} {error}"
        return
    if missing:
        yield f"{INDEX} names tensors that are not where it says: {', '.join(missing[:5])}"


def _bytes(file: Path) -> bytearray:
    """The file's bytes, after the library found its header sound."""
    with safe_open(file, framework="pt"):
        pass
    with file.open("rb", buffering=0) as stream:
        data = bytearray(file.stat().st_size)
        view, filled = memoryview(data), 0
        while filled < len(data):
            got = stream.readinto(view[filled:])
            if not got:
                raise ValueError("it became shorter while it was read")
            filled += got
    return data


def _tensors(data: bytearray) -> Iterator[tuple[str, str, Tensor | None]]:
    """Name, dtype and view of every tensor; no view for what is not floating point.

    The format: eight bytes little-endian with the header's length, the header as JSON, then the data that it points to
    (https://github.com/huggingface/safetensors#format). The library would copy each tensor once more.
    """
    (length,) = struct.unpack_from("<Q", data)
    start = 8 + length
    for name, said, dtype, shape, numbers, begin, end in _header(bytes(data[8:start])):
        if dtype is None:
            yield name, said, None
            continue
        if start + end > len(data):
            raise ValueError(f"{name} does not lie within the file")
        if numbers:
            flat = torch.frombuffer(data, dtype=dtype, count=numbers, offset=start + begin)
        else:  # torch takes no empty buffer
            flat = torch.empty(0, dtype=dtype)
        yield name, said, flat.view(shape)


class _Entry(NamedTuple):
    """Of a header: where a tensor lies in the data, from `begin` to `end`."""

    name: str
    said: str
    dtype: torch.dtype | None
    """None for what is not floating point."""
    shape: tuple[int, ...]
    numbers: int
    begin: int
    end: int


@lru_cache(maxsize=4)
def _header(data: bytes) -> tuple[_Entry, ...]:
    """What it says of each tensor. Kept, since adapters of one recipe have one header: 0.3 ms of 168 tensors' 0.9."""
    entries = []
    for name, one in json.loads(data, object_pairs_hook=_unique).items():
        if name == "__metadata__":
            continue
        (begin, end), shape, dtype = one["data_offsets"], tuple(one["shape"]), _DTYPES.get(one["dtype"])
        numbers = math.prod(shape)
        if dtype is not None and (begin < 0 or end - begin != numbers * dtype.itemsize):
            raise ValueError(f"{name} is not of the size that its shape has")
        entries.append(_Entry(name, one["dtype"], dtype, shape, numbers, begin, end))
    return tuple(entries)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the reader would keep the last of two equal keys without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
        raise ValueError(f"its header has {', '.join(twice[:5])} twice")
    return found
