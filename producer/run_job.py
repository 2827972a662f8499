"""A run's job: checked, with an identity and the journal that goes by it, and the ways of running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loramill.producer.index import Index
from loramill.producer.interrupts import Interrupts
from loramill.producer.invalid import InvalidLines
from loramill.producer.options import RunOptions
from loramill.producer.reader import Input
from loramill.producer.run_queue import has_rows, remove_queue
from loramill.producer.summary import Summary
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.errors import JournalDamaged, JournalMismatch
from loramill.store.journal import Journal, Totals, remove_journal
from loramill.worker.models import Models

_ON_DEVICES = "--devices"


@dataclass(slots=True, frozen=True)
class RunJob:
    """A checked job."""

    options: RunOptions
    models: Models
    source: Input
    index: Index
    invalid: InvalidLines

    @property
    def longest_row(self) -> NDArray[np.int64]:
        """(rows,) tokens of each, prompt and answer at their longest."""
        longest: NDArray[np.int64] = self.index.prompt_tokens + self.index.max_tokens
        return longest

    @property
    def identity(self) -> dict[str, str]:
        """What decides the job's answers, and where they are kept."""
        options = self.options
        kept = {_ON_DEVICES: "given"} if options.devices else {}
        return kept | {
            "input": self.source.sha256,
            "--limit": str(options.limit),
            "--base-name": self.models.names.base,
            "--lora-mode": options.lora_mode,
            **self.models.identity(self.index.adapters),
        }


class Way(Protocol):
    """How a job's rows are answered, and where they are until the files are in place."""

    def totals(self) -> Totals:
        """Over all finished rows."""

    def done(self) -> NDArray[np.bool_]:
        """(rows of the input,) whether each is finished."""

    def describe(self, left: NDArray[np.int64]) -> dict[str, Any]:
        """The plan of the rows at positions `left` of the index, for `explain`."""

    def answer(self, summary: Summary, interrupts: Interrupts) -> None:
        """Finishes what is not, until all is or an interrupt asks to stop."""

    def publish(self) -> None:
        """Puts the files in place once all rows are finished, and removes what kept them."""

    def close(self) -> None:
        """Lets go of what keeps them."""


def open_journal(job: RunJob) -> Journal:
    """The journal of this very job: whoever has it has the queue beside it too, and nobody else. Raises Failure (INPUT)
    for another's, unless it may be replaced; StoreError."""
    options = job.options

    def opened() -> Journal:
        return Journal(options.journal_path, job.identity, kept_elsewhere=lambda: has_rows(options.queue_path))

    try:
        journal = opened()
    except (JournalMismatch, JournalDamaged) as error:
        if not options.overwrite:
            code = ExitCode.INPUT if isinstance(error, JournalMismatch) else ExitCode.MACHINE
            raise Failure(code, f"{_said(error, options)}; pass --overwrite to start afresh") from error
        remove_journal(options.journal_path)
        remove_queue(options.queue_path)
        journal = opened()
    if not options.devices:
        remove_queue(options.queue_path)  # of nobody: it has no row that this journal knows of
    return journal


def _said(error: JournalMismatch | JournalDamaged, options: RunOptions) -> str:
    if isinstance(error, JournalMismatch) and any(part.startswith(f"{_ON_DEVICES} ") for part in error.changed):
        begun, now = ("without", "with") if options.devices else ("with", "without")
        return f"{error}: it was begun {begun} --devices and can only go on so, not {now}"
    return str(error)
