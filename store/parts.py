"""Where payloads are: in the store itself, or in part files that it speaks of."""

from __future__ import annotations

import hashlib

import numpy as np
import orjson

from loramill.store.errors import StoreError
from loramill.store.packing import INDEX, Chunk, compress, decompress
from loramill.store.part_files import Files
from loramill.store.records import Lease

_INLINE, _FILE = b"\0", b"\1"


def keep(files: Files | None, name: str, payload: bytes) -> bytes:
    """What the store keeps of `payload`: all of it, or where it is, once it is durable there."""
    if files is None:
        return _INLINE + payload
    files.put(name, payload)
    return _FILE + orjson.dumps({"file": name, "bytes": len(payload), "sha256": _sha256(payload)})


def fetch(files: Files | None, kept: bytes) -> bytes:
    """The payload again. Raises StoreError if its file is gone, or is not what was written."""
    if kept[:1] == _INLINE:
        return kept[1:]
    said = orjson.loads(kept[1:])
    if files is None:
        raise StoreError(f"{said['file']} is in files, and this store was opened without: give --files")
    payload = files.get(said["file"])
    if _sha256(payload) != said["sha256"]:
        raise StoreError(f"{files.url}/{said['file']} is not what was written: {len(payload)} of {said['bytes']} bytes")
    return payload


def keep_chunk(files: Files | None, name: str, chunk: Chunk) -> bytes:
    """The entry of a chunk: its index, and where its lines are. A part file holds nothing but the lines."""
    index = compress(chunk.index.tobytes())
    return len(index).to_bytes(4, "little") + index + keep(files, name, compress(chunk.lines))


def fetch_chunk(files: Files | None, entry: bytes) -> Chunk:
    """Raises StoreError like `fetch`."""
    split = 4 + int.from_bytes(entry[:4], "little")
    index = np.frombuffer(decompress(entry[4:split]), INDEX)
    return Chunk(index, decompress(fetch(files, entry[split:])))


def part_name(lease: Lease, chunk: Chunk) -> str:
    """Of the part file of a chunk: the same when a commit is tried again, and never another lease's or another chunk's.
    An entry that speaks of a file needs that very file, so two chunks of one lease must not share a name."""
    first = int(chunk.index["position"][0])
    return f"{lease.job}/part-{lease.shard:06}-{lease.token}-{first:06}-{_sha256(chunk.lines)[:16]}.jsonl.zst"


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
