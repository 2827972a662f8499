"""The Python API: the engine of `loramill run`, in the caller's process, on the caller's rows."""

from __future__ import annotations

import asyncio
import json
import queue
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from loramill.producer.failures import Failure
from loramill.producer.generated import Generated, Row, generated, line_of, rows_of
from loramill.producer.options import ModelOptions
from loramill.producer.reader import Input
from loramill.producer.validate import validate

if TYPE_CHECKING:
    from loramill.producer.local import Shard
    from loramill.store.journal import DoneRow


@dataclass(slots=True)
class _Batch:
    """Checked rows on their way."""

    count: int
    shard: Shard


class Mill:
    """A base model with its adapters, loaded.

    `options` are those of `loramill run`, by their long names: `max_loras_per_batch=8`, `dtype="float32"`,
    `adapters_dir=...`, `seed=0`, ... Raises ValueError for a base or adapters that cannot be served, with every reason.
    """

    def __init__(
        self,
        base_model: str | PathLike[str],
        adapters: Mapping[str, str | PathLike[str]] | None = None,
        **options: Any,
    ) -> None:
        from loramill.producer import local  # torch comes with it

        for name in ("adapters_dir", "chat_template"):
            if options.get(name) is not None:
                options[name] = Path(options[name])
        folders = {name: Path(path) for name, path in (adapters or {}).items()}
        wanted = ModelOptions(base_model=str(base_model), adapters=folders, **options)
        try:
            self._models = local.open_models(wanted)
            local.refuse_adapters(self._models.unusable)
            self._engine = local.LocalEngine(self._models, wanted)
        except Failure as failure:
            raise ValueError(str(failure)) from failure
        self._rows_seen = 0

    def generate(self, prompts: Any, *, adapter: str | None = None, **sampling: Any) -> Iterator[Generated]:
        """Answers `prompts` (one or several of: text, token ids, chat messages), all by `adapter` and with the same
        `sampling` fields (`max_tokens`, `temperature`, `n`, `stop`, ...).

        Everything is checked at once, and run as the results are taken; they come in the order of the prompts. Without
        a `seed`, each row has its own, which depends on the mill's and on how many rows came before.
        Raises ValueError naming row and field.
        """
        return self.run(rows_of(prompts, adapter, sampling))

    def run(self, rows: Iterable[Row]) -> Iterator[Generated]:
        """Like `generate` for rows with their own adapters and sampling: `{"adapter", "prompt" | "messages", ...}`."""
        ready: dict[int, bytes] = {}
        batch = self._open(rows, lambda done: ready.update((row.row, row.line) for row in done))
        return self._results(batch, ready) if batch else iter(())

    def close(self) -> None:
        """Lets the model go."""
        del self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _results(self, batch: _Batch, ready: dict[int, bytes]) -> Iterator[Generated]:
        runner = self._engine.runner
        runner.submit(batch.shard)
        try:
            for number in range(batch.count):
                while number not in ready:
                    runner.step()
                yield generated(number, ready.pop(number))
        finally:
            self._drop(batch)

    def _open(self, rows: Iterable[Row], emit: Callable[[list[DoneRow]], None]) -> _Batch | None:
        """Checks rows the way the command does: as lines of a file. None if there are none."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        first = self._rows_seen
        for row in rows:
            file.write(json.dumps(line_of(row, self._rows_seen)).encode() + b"\n")
            self._rows_seen += 1
        file.flush()
        source = Input("rows", file)
        # Whoever holds the rows may drop them anywhere: a generator never started, an event loop that ended.
        weakref.finalize(source, file.close)
        if self._rows_seen == first:
            return None
        models = self._models
        index = validate(source, models.prompter, base_name=models.base_name, adapters=models.names)
        if index.problem_count:
            shown = [f"row {p.line - 1}: {p.param}: {p.message}" for p in index.problems]
            raise ValueError("\n".join([*shown, f"{index.problem_count} of {index.total_rows} rows are invalid"]))
        left = np.arange(len(index))
        shard = self._engine.shard(source, index, left, job_id=f"mill-{id(self):x}-{first}", emit=emit)
        return _Batch(len(index), shard)

    def _drop(self, batch: _Batch) -> None:
        self._engine.runner.cancel(batch.shard)


class AsyncMill:
    """A Mill in a thread of its own: `async with AsyncMill(base, adapters=...) as mill`.

    Any number of calls at once share its batches.
    """

    def __init__(
        self,
        base_model: str | PathLike[str],
        adapters: Mapping[str, str | PathLike[str]] | None = None,
        **options: Any,
    ) -> None:
        self._make: Callable[[], Mill] = lambda: Mill(base_model, adapters, **options)
        self._todo: queue.SimpleQueue[Callable[[Mill], None] | None] = queue.SimpleQueue()
        self._listeners: set[Callable[[Any], None]] = set()
        self._ended: BaseException | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loaded: asyncio.Queue[BaseException | None] = asyncio.Queue()
        self._thread = threading.Thread(
            target=self._serve, args=(lambda error: loop.call_soon_threadsafe(loaded.put_nowait, error),), daemon=True
        )
        self._thread.start()
        if error := await loaded.get():
            raise error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._todo.put(None)
        await asyncio.to_thread(self._thread.join)

    def generate(self, prompts: Any, *, adapter: str | None = None, **sampling: Any) -> AsyncIterator[Generated]:
        """As Mill.generate; the rows run whether or not the results are taken."""
        return self.run(rows_of(prompts, adapter, sampling))

    async def run(self, rows: Iterable[Row]) -> AsyncIterator[Generated]:
        """As Mill.run."""
        loop = asyncio.get_running_loop()
        mail: asyncio.Queue[Any] = asyncio.Queue()

        def post(item: Any) -> None:
            loop.call_soon_threadsafe(mail.put_nowait, item)

        self._listeners.add(post)  # before the look at _ended: whatever ends the thread now is heard of
        if self._ended:
            raise self._ended
        batch: _Batch | None = None
        try:
            self._todo.put(lambda mill: self._submit(mill, rows, post))
            batch = _raised(await mail.get())
            ready: dict[int, bytes] = {}
            for number in range(batch.count if batch else 0):
                while number not in ready:
                    ready.update((row.row, row.line) for row in _raised(await mail.get()))
                yield generated(number, ready.pop(number))
        finally:
            self._listeners.discard(post)
            if batch is not None:
                dropped = batch
                self._todo.put(lambda mill: mill._drop(dropped))

    def _serve(self, loaded: Callable[[BaseException | None], Any]) -> None:
        try:
            mill = self._make()
        except BaseException as error:
            loaded(error)
            return
        loaded(None)
        with mill:
            self._work(mill)

    def _work(self, mill: Mill) -> None:
        runner = mill._engine.runner
        while True:
            try:
                todo = self._todo.get(block=not runner.has_work)
                if todo is None:
                    return
                todo(mill)
            except queue.Empty:
                pass
            try:
                runner.step()
            except BaseException as error:
                self._ended = error
                for post in list(self._listeners):
                    post(error)
                return

    @staticmethod
    def _submit(mill: Mill, rows: Iterable[Row], post: Callable[[Any], None]) -> None:
        try:
            batch = mill._open(rows, post)
        except Exception as error:
            post(error)
            return
        post(batch)
        if batch:
            mill._engine.runner.submit(batch.shard)


def _raised(item: Any) -> Any:
    if isinstance(item, BaseException):
        raise item
    return item
