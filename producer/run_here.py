"""A run by one engine in this process; its finished rows are in the journal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramill.producer.interrupts import Interrupts
from loramill.producer.local import LocalEngine
from loramill.producer.outputs import publish
from loramill.producer.progress import Moment, Progress, note
from loramill.producer.run_job import RunJob
from loramill.producer.summary import Summary
from loramill.store.journal import DoneRow, Journal, Totals

_COMMIT_ROWS = 4096


class Here:
    """A Way."""

    def __init__(self, job: RunJob, journal: Journal | None) -> None:
        """Without a journal nothing is finished, and nothing can be."""
        self._job, self._kept = job, journal

    @property
    def _journal(self) -> Journal:
        assert self._kept is not None
        return self._kept

    def totals(self) -> Totals:
        """The journal's."""
        return self._journal.totals()

    def done(self) -> NDArray[np.bool_]:
        """The journal's."""
        rows = self._job.index.total_rows
        return np.zeros(rows, np.bool_) if self._kept is None else self._kept.done(rows)

    def describe(self, left: NDArray[np.int64]) -> dict[str, Any]:
        """With what passes take here: the weights are loaded, and a few are timed."""
        job = self._job
        decided = {} if self._kept is None else self._kept.decisions()
        with closing(self._load(left)) as engine:
            return engine.plan(job.index, left, job.models.names, decided, timed=True).describe()

    def answer(self, summary: Summary, interrupts: Interrupts) -> None:
        """Invalid lines first, which need no engine."""
        job, journal = self._job, self._journal
        _commit(journal, job.invalid.rows(journal.identity_sha256))
        left = np.flatnonzero(~self.done()[job.index.row])
        if len(left):
            self._run(left, summary, interrupts)

    def publish(self) -> None:
        """From the journal."""
        publish(self._journal, self._job.options)

    def close(self) -> None:
        """Releases the journal."""
        if self._kept is not None:
            self._kept.close()

    def _run(self, left: NDArray[np.int64], summary: Summary, interrupts: Interrupts) -> None:
        job, journal, index, quiet = self._job, self._journal, self._job.index, self._job.options.quiet
        before = f", {summary.resumed:,} done before" if summary.resumed else ""
        note(f"{summary.rows:,} rows{before}, {len(index.adapters)} adapters: loading the base", quiet=quiet)
        load_started_s = time.monotonic()
        engine = self._load(left)
        run_started_s = time.monotonic()
        plan = engine.plan(index, left, job.models.names, journal.decisions())
        journal.decide(plan.decisions)
        for line in plan.summary():
            note(line, quiet=quiet)
        totals = journal.totals()
        rows_done, rows_failed = totals.done, totals.failed

        def commit(rows: list[DoneRow]) -> None:
            nonlocal rows_done, rows_failed
            journal.commit(rows)
            rows_done += len(rows)
            rows_failed += sum(row.failed for row in rows)

        def show() -> None:
            stats = engine.stats
            tokens = (stats.prompt_tokens, stats.completion_tokens)
            progress.update(Moment(rows_done, rows_failed, *tokens, stats.resident, stats.prompt_tokens_shared))

        names, job_id = job.models.names, journal.identity_sha256
        shard = engine.shard(job.source, index, left, plan, names=names, job_id=job_id, emit=commit)
        with closing(engine), Progress(summary.rows, quiet=quiet) as progress, interrupts.draining():
            engine.run(shard, stopping=lambda: interrupts.requested, on_step=show)
        summary.load_s = run_started_s - load_started_s
        summary.run_s = time.monotonic() - run_started_s
        summary.count(asdict(engine.stats), list(plan.decisions.values()))

    def _load(self, left: NDArray[np.int64]) -> LocalEngine:
        job = self._job
        longest = int(job.longest_row[left].max())
        return LocalEngine(job.models, job.options, longest_row=longest, adapters=job.index.adapters)


def _commit(journal: Journal, rows: Iterator[DoneRow]) -> None:
    while some := list(islice(rows, _COMMIT_ROWS)):
        journal.commit(some)
