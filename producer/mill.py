"""The Python API: the engine of `loramill run`, in the caller's process, on the caller's rows."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from loramill.producer.generated import Generated, Row, generated, line_of, rows_of, with_token_ids
from loramill.producer.progress import note
from loramill.producer.reader import Input
from loramill.producer.validate import validate
from loramill.schemas.errors import did_you_mean
from loramill.schemas.failures import Failure
from loramill.worker.settings import ModelOptions
from loramill.worker.specs import check_name, spec_of

if TYPE_CHECKING:
    from loramill.producer.local import Shard
    from loramill.store.journal import DoneRow


Given = str | PathLike[str] | tuple[str | PathLike[str], float] | Mapping[str, Any]
"""An adapter: a path or a hub id as `--adapter` takes it, with its scale, or `{"path", "revision", "scale"}`."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Batch:
    """Checked rows on their way."""

    count: int
    shard: Shard
    adapters: frozenset[str]
    """Content hashes that the rows use."""
    left: int
    """Rows that have not finished."""
    submitted: bool = False


class Mill:
    """A base model with its adapters, loaded.

    `options` are those of `loramill run`, by their long names: `max_loras_per_batch=8`, `dtype="float32"`,
    `adapters_dir=...`, `adapters_file=...`, `seed=0`, ... Raises ValueError for a base or adapters that cannot be
    served, with every reason.
    """

    def __init__(
        self,
        base_model: str | PathLike[str],
        adapters: Mapping[str, Given] | None = None,
        **options: Any,
    ) -> None:
        from loramill.producer.local import LocalEngine  # torch comes with these
        from loramill.worker.models import open_models, refuse_adapters

        for name in ("adapters_dir", "adapters_file", "chat_template"):
            if options.get(name) is not None:
                options[name] = Path(options[name])
        specs = {check_name(name): spec_of(given) for name, given in (adapters or {}).items()}
        self._options = ModelOptions(base_model=str(base_model), adapters=specs, **options)
        try:
            self._models = open_models(self._options)
            refuse_adapters(self._models.unusable)
            for warning in self._models.warnings:
                note(f"Warning: {warning}")
            self._engine = LocalEngine(self._models, self._options)
        except Failure as failure:
            raise ValueError(str(failure)) from failure
        self._rows_seen = 0
        self._batches: weakref.WeakSet[Batch] = weakref.WeakSet()
        self._retired: set[str] = set()
        """Content hashes that no name stands for any more; rows that began before may use them."""

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
        batch = self.open(rows, lambda done: ready.update((row.row, row.line) for row in done))
        return self._results(batch, ready) if batch else iter(())

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters' names, each with its content's hash."""
        return {name: named.sha256 for name, named in self._models.names.adapters.items()}

    def add_adapter(self, name: str, path: str | PathLike[str], scale: float = 1.0) -> None:
        """One adapter more, for rows that come from now on. Raises ValueError with every reason against it."""
        if name in self._models.names.adapters:
            raise ValueError(f"there is an adapter {name!r} already: replace_adapter puts another in its place")
        self._put(name, path, scale)

    def replace_adapter(self, name: str, path: str | PathLike[str], scale: float = 1.0) -> None:
        """Another adapter under a name that there is. Rows that were passed before are answered by the old one.

        Raises ValueError with every reason against it; then the old one stays.
        """
        self._retired.add(self._known(name))
        self._put(name, path, scale)

    def remove_adapter(self, name: str, *, wait: bool = False) -> None:
        """Forget an adapter. With `wait`, rows that use it are finished first.

        Raises ValueError if it is not known, an alias or a route leads to it, or rows that use it are not finished.
        """
        sha256 = self._known(name)
        without = self._models.without_adapter(name)
        if wait:
            self._finish(sha256)
        if self._in_use(sha256):
            raise ValueError(f"adapter {name!r} is in use by rows that are not finished; wait=True finishes them")
        self._models = without
        self._retired.add(sha256)
        self._forget_retired()

    def close(self) -> None:
        """Lets the model go."""
        self._engine.close()
        del self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, batch: Batch) -> None:
        """Lets the rows run, if they do not already."""
        if not batch.submitted:
            batch.submitted = True
            self._engine.runner.submit(batch.shard)

    def drop(self, batch: Batch) -> None:
        """Starts no further row of the batch."""
        batch.left = 0
        self._engine.runner.cancel(batch.shard)

    def step(self) -> None:
        """One forward pass over the rows of every batch; does nothing if there is none."""
        self._engine.runner.step()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._engine.runner.has_work

    def open(self, rows: Iterable[Row], emit: Callable[[list[DoneRow]], None]) -> Batch | None:
        """Checks rows the way the command does: as lines of a file. None if there are none. Raises ValueError."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        first = self._rows_seen
        for row in rows:
            file.write(json.dumps(with_token_ids(line_of(row, self._rows_seen))).encode() + b"\n")
            self._rows_seen += 1
        file.flush()
        source = Input("rows", file)
        # Whoever holds the rows may drop them anywhere: a generator never started, an event loop that ended.
        weakref.finalize(source, file.close)
        if self._rows_seen == first:
            return None
        self._forget_retired()
        names, max_mix = self._models.names, self._models.slots
        index = validate(source, self._models.prompter, names=names, max_mix=max_mix)
        if index.problem_count:
            shown = [f"row {p.line - 1}: {p.param}: {p.message}" for p in index.problems]
            raise ValueError("\n".join([*shown, f"{index.problem_count} of {index.total_rows} rows are invalid"]))

        def count(done: list[DoneRow]) -> None:
            if batch := held():
                batch.left -= len(done)
            emit(done)

        rows = np.arange(len(index))
        try:
            plan = self._engine.plan(index, rows, names)
        except Failure as failure:
            raise ValueError(str(failure)) from failure
        shard = self._engine.shard(
            source, index, rows, plan, names=names, job_id=f"mill-{id(self):x}-{first}", emit=count
        )
        used = frozenset(names.adapters[name].sha256 for name in index.adapters)
        batch = Batch(len(index), shard, used, left=len(index))
        held = weakref.ref(batch)
        self._batches.add(batch)
        return batch

    def _results(self, batch: Batch, ready: dict[int, bytes]) -> Iterator[Generated]:
        self.submit(batch)
        try:
            for number in range(batch.count):
                while number not in ready:
                    self.step()
                yield generated(number, ready.pop(number))
        finally:
            self.drop(batch)

    def _known(self, name: str) -> str:
        if name not in self._models.names.adapters:
            raise ValueError(f"there is no adapter {name!r}{did_you_mean(name, self._models.names.adapters)}")
        return self._models.names.adapters[name].sha256

    def _put(self, name: str, path: str | PathLike[str], scale: float) -> None:
        try:
            changed, opened = self._models.adding(name, spec_of((path, scale)))
        except ValueError as error:
            raise ValueError("\n".join(f"adapter `{name}`: {why}" for why in str(error).splitlines())) from error
        if opened.warning:
            note(f"Warning: adapter `{name}`: {opened.warning}")
        self._engine.register(opened.adapter)  # may refuse it: then the names stay as they are
        self._models = changed
        self._forget_retired()

    def _in_use(self, sha256: str) -> bool:
        return any(batch.left and sha256 in batch.adapters for batch in self._batches)

    def _finish(self, sha256: str) -> None:
        """Runs until no row is left that uses this content."""
        for batch in [batch for batch in self._batches if sha256 in batch.adapters and batch.left]:
            self.submit(batch)
        while self._in_use(sha256):
            self.step()

    def _forget_retired(self) -> None:
        """Lets the engine forget contents that neither a name nor a row stands for any more."""
        named = set(self.adapters.values())
        for sha256 in [sha256 for sha256 in self._retired if sha256 in named or not self._in_use(sha256)]:
            try:
                if sha256 not in named:
                    self._engine.forget(sha256)
            except ValueError:
                continue  # dropped rows that the engine has begun still use it
            self._retired.discard(sha256)
