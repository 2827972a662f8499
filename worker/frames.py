"""What the worker process and its engine child say to each other: frames over two pipes.

The child reads its standard input and writes its standard output, which it takes for itself before anything else can
print there (`child.take_pipes`): what libraries print goes to standard error. A frame is the lengths of its header and
its blob (32 bits each, little-endian), the header (a JSON object with the frame's kind), and the blob.

| to the child | fields | blob |
|---|---|---|
| `settings` | ModelOptions' fields, before anything else | |
| `job` | `spec`: JobSpec, once, before the job's first shard | |
| `shard` | `key`: a number not in use; `job`: id; `skip`: hex of Claim.done; `alone`: positions | pack_shard()'s |
| `stop` | `key`; `now`: whether running rows are dropped too, instead of finished | |
| `forget` | `job`: none of its shards is left | |
| `load` | `name`, `source`, `scale`: see `registry.find`; `stamp`: of the wish | |
| `unload` | `name`; `stamp` | |
| `drop` | `key`: of an adapter that no shard to come needs | |

| from the child | fields | blob |
|---|---|---|
| `blob` | `sha`: hex | a tokenizer's file |
| `manifest` | `manifest`: Manifest; after the blobs that it names; again after each change | |
| `answer` | `name`, `stamp`: `load` or `unload` is carried out; `refused`: or why not, else null | |
| `ready` | `device`, `max_num_seqs`, `resident`: keys of adapters | |
| `fatal` | `code`: ExitCode, `lines`: it ends now, and would again | |
| `running` | `started`: [key, position] of rows that run from now on; `alone`: the one row, and nothing else | |
| `rows` | `key`; `tallies`: see `worker_stats` | Chunk.to_bytes() |
| `delta` | `key`, `choices`: SaidChoice's fields, of a job that streams | |
| `end` | `key`: no more rows of that shard will come | |
| `beat` | `steps`: passes so far, `busy`, `resident`, `stats`: EngineStats | |

`running` comes before the pass in which the rows first run. A beat comes every BEAT_S from the loop that runs the
passes, so a pass that hangs stops it. The child ends when its input is closed, or with its parent: it holds nothing
that is not elsewhere.
"""

from __future__ import annotations

import os
import struct
from enum import StrEnum
from typing import IO, Any, NamedTuple

import orjson

BEAT_S = 1.0
MAX_BYTES = 2**30
"""Of a header or a blob: beyond, the stream is not frames."""
_LENGTHS = struct.Struct("<II")


class Kind(StrEnum):
    """What a frame says."""

    SETTINGS = "settings"
    JOB = "job"
    SHARD = "shard"
    STOP = "stop"
    FORGET = "forget"
    LOAD = "load"
    UNLOAD = "unload"
    DROP = "drop"
    BLOB = "blob"
    MANIFEST = "manifest"
    ANSWER = "answer"
    READY = "ready"
    FATAL = "fatal"
    RUNNING = "running"
    ROWS = "rows"
    DELTA = "delta"
    END = "end"
    BEAT = "beat"


class Frame(NamedTuple):
    """One message."""

    kind: Kind
    fields: dict[str, Any]
    blob: bytes = b""


def write_frame(out: IO[bytes], kind: Kind, blob: bytes = b"", **fields: Any) -> None:
    """Writes a frame at once. Not for two threads at a time. Raises OSError (BrokenPipeError) if nobody reads."""
    header = orjson.dumps({"kind": kind, **fields}, default=os.fspath)
    out.write(_LENGTHS.pack(len(header), len(blob)) + header + blob)
    out.flush()


def read_frame(inbound: IO[bytes]) -> Frame | None:
    """The next frame of a buffered stream; None once the other end is closed, be it amid a frame.

    Raises ValueError for what is no frame.
    """
    lengths = inbound.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_bytes, blob_bytes = _LENGTHS.unpack(lengths)
    if max(header_bytes, blob_bytes) > MAX_BYTES:
        raise ValueError(f"not a frame: {header_bytes} and {blob_bytes} bytes are announced")
    header, blob = inbound.read(header_bytes), inbound.read(blob_bytes)
    if len(header) < header_bytes or len(blob) < blob_bytes:
        return None
    fields = orjson.loads(header)
    return Frame(Kind(fields.pop("kind")), fields, blob)
