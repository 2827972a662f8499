"""`python -m loramill.worker.child`: the process that holds the model. Its worker feeds it shards over pipes."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from loramill.schemas.failures import Failure
from loramill.schemas.job import JobSpec
from loramill.schemas.said import SaidChoice
from loramill.store.packing import Chunk, unpack_shard
from loramill.store.records import DoneRow
from loramill.worker.changes import KINDS, Changes, Prepared
from loramill.worker.frames import BEAT_S, Frame, Kind, read_frame, write_frame
from loramill.worker.request import Mix
from loramill.worker.serving import Served, open_served
from loramill.worker.settings import ModelOptions
from loramill.worker.shard_runner import Job, Shard, ShardRunner
from loramill.worker.specs import AdapterSpec
from loramill.worker.worker_stats import tally

_PR_SET_PDEATHSIG = 1


def main(open_engine: Callable[[ModelOptions], Served] = open_served) -> NoReturn:
    """Runs the child on the process's own standard input and output."""
    inbound, outbound = take_pipes()
    # A terminal's Ctrl-C reaches the whole group, and the worker decides when it is time to go.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    die_with_parent()
    try:
        code = serve(inbound, outbound, open_engine)
    except BrokenPipeError:
        code = 0
    sys.stderr.flush()
    os._exit(code)  # at once: threads that read adapters or frames hold nothing


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, for frames alone: others find nothing to read, and print to standard error."""
    inbound, outbound = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return inbound, outbound


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends (Linux). Elsewhere, and for a parent that
    was gone before this call, the end of the input does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(inbound: BinaryIO, outbound: BinaryIO, open_engine: Callable[[ModelOptions], Served]) -> int:
    """Opens the engine as the first frame says, and answers shards until the process ends: with its input, from the
    reading thread. Returns an exit code if the engine cannot be opened."""
    frames: queue.SimpleQueue[Frame | Prepared] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(inbound, frames), daemon=True).start()
    first = frames.get()
    assert isinstance(first, Frame)
    try:
        served = open_engine(options_of(first.fields))
    except Failure as failure:
        write_frame(outbound, Kind.FATAL, code=int(failure.code), lines=failure.lines)
        return int(failure.code)
    changes = Changes(served, outbound, frames.put)
    changes.say()
    engine = served.engine
    write_frame(outbound, Kind.READY, device=engine.device, resident=served.resident, max_num_seqs=engine.max_num_seqs)
    child = _Child(changes, frames, outbound)
    while True:
        child.turn()


def options_of(fields: Mapping[str, Any]) -> ModelOptions:
    """Settings again, from JSON."""
    given = dict(fields)
    for name in ("adapters", "adapters_json"):
        given[name] = {key: AdapterSpec(**spec | {"root": Path(spec["root"])}) for key, spec in given[name].items()}
    for name in ("adapters_dir", "adapters_file", "chat_template"):
        given[name] = None if given[name] is None else Path(given[name])
    return ModelOptions(**given)


def _read(inbound: BinaryIO, frames: queue.SimpleQueue[Frame | Prepared]) -> None:
    code = 1
    try:
        while (frame := read_frame(inbound)) is not None:
            frames.put(frame)
        code = 0  # whoever asked is gone
    except ValueError as error:
        print(f"Error: the engine was told what is {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


class _Child:
    """The loop: what came in, one pass, what goes out."""

    def __init__(self, changes: Changes, frames: queue.SimpleQueue[Frame | Prepared], outbound: BinaryIO) -> None:
        self._changes, self._frames, self._out = changes, frames, outbound
        self._served = served = changes.served
        self._runner = ShardRunner(served.engine, served.prompter)
        self._alone = served.alone
        self._specs: dict[str, JobSpec] = {}
        self._jobs: dict[str, Job] = {}
        self._shards: dict[int, Shard] = {}
        self._steps = 0
        self._beat_at_s = 0.0

    def turn(self) -> None:
        """Once round."""
        self._take_frames()
        if self._runner.has_work:
            try:
                self._runner.step()
            except (MemoryError, RuntimeError):  # the engine's end: what it has finished is still worth keeping
                self._runner.emit_all()
                raise
            self._steps += 1
        ended = [key for key, shard in self._shards.items() if not self._runner.holds(shard)]
        for key in ended:
            del self._shards[key]
            write_frame(self._out, Kind.END, key=key)
        # Whoever wants to know what a job came to need not wait for a beat.
        self._beat(at_once=bool(ended) and not self._shards)

    def _take_frames(self) -> None:
        """Everything that is there; when there is nothing to run, waits for it until the next beat."""
        idle_s = 0.0 if self._runner.has_work else max(0.0, self._beat_at_s + BEAT_S - time.monotonic())
        try:
            self._take(self._frames.get(timeout=idle_s) if idle_s else self._frames.get_nowait())
            while True:
                self._take(self._frames.get_nowait())
        except queue.Empty:
            return

    def _take(self, frame: Frame | Prepared) -> None:
        if isinstance(frame, Prepared) or frame.kind in KINDS:
            return self._change(frame)
        said = frame.fields
        if frame.kind is Kind.JOB:
            spec = self._specs[said["spec"]["id"]] = JobSpec.model_validate(said["spec"])
            self._jobs[spec.id] = self._served.job(spec)
        elif frame.kind is Kind.FORGET:
            self._specs.pop(said["job"], None)
            self._jobs.pop(said["job"], None)
        elif frame.kind is Kind.SHARD:
            self._start(said["key"], self._jobs[said["job"]], unpack_shard(frame.blob), said)
        elif frame.kind is Kind.STOP and said["key"] in self._shards:
            self._runner.cancel(self._shards[said["key"]], now=said["now"])
            self._runner.emit_all()

    def _change(self, frame: Frame | Prepared) -> None:
        if isinstance(frame, Prepared):
            self._changes.take(frame)
        else:
            self._changes.ask(frame)
        if self._changes.served is not self._served:
            self._served = self._changes.served
            self._alone = self._served.alone
            # What a job's later shards need may have come since its first one.
            self._jobs = {key: self._served.job(spec) for key, spec in self._specs.items()}

    def _start(self, key: int, job: Job, rows: list[tuple[int, bytes]], said: Mapping[str, Any]) -> None:
        position = {number: at for at, (number, _) in enumerate(rows)}
        # Zeros at the end may lack, and numpy would make them up from what is in memory.
        bits = bytes.fromhex(said["skip"]).ljust(-(-len(rows) // 8), b"\0")
        done = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(rows)).tolist()

        def emit(finished: list[DoneRow]) -> None:
            chunk = Chunk.of(finished, [position[row.row] for row in finished])
            write_frame(self._out, Kind.ROWS, chunk.to_bytes(), key=key, tallies=tally(finished))

        def on_start(numbers: list[int], alone: bool) -> None:
            write_frame(self._out, Kind.RUNNING, started=[[key, position[one]] for one in numbers], alone=alone)

        def tell(news: list[SaidChoice]) -> None:
            write_frame(self._out, Kind.DELTA, key=key, choices=[said.model_dump() for said in news])

        shard = Shard(
            job,
            (row for row, is_done in zip(rows, done, strict=True) if not is_done),
            emit,
            merged=self._is_merged,
            alone=frozenset(rows[at][0] for at in said["alone"]),
            on_start=on_start,
            tell=tell,
        )
        self._shards[key] = shard
        self._runner.submit(shard)

    def _is_merged(self, mix: Mix) -> bool:
        """A queue serves statically what can be served no other way."""
        return mix[0][0] in self._alone

    def _beat(self, *, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self._beat_at_s < BEAT_S:
            return
        self._beat_at_s = time.monotonic()
        served, busy = self._served, self._runner.has_work
        stats = served.engine.stats
        write_frame(self._out, Kind.BEAT, steps=self._steps, busy=busy, resident=served.resident, stats=stats)


if __name__ == "__main__":
    main()
