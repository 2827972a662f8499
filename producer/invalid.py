"""The invalid lines of an input: shown to whoever must mend them, or kept on disk by what goes on without them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from loramill.producer.index import Index
from loramill.schemas.errors import LineError
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobError
from loramill.schemas.response import error_line
from loramill.store.journal import DoneRow


class Refused(Failure):
    """An input that is refused; `errors` says why as data, the lines of the failure say it to people."""

    def __init__(self, errors: Iterable[JobError], *lines: str) -> None:
        super().__init__(ExitCode.INPUT, *lines)
        self.errors = tuple(errors)


class InvalidLines:
    """What is wrong with each, in an unnamed file in `folder`: there may be as many as rows."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with this object)

    def add(self, row: int, line: int, error: LineError) -> None:
        """Takes the invalid row number `row`; `line` is its line in the file."""
        record = [row, f"line {line}: {error.message}", error.code, error.param, error.custom_id]
        self._file.write(json.dumps(record).encode() + b"\n")

    def rows(self, job_id: str) -> Iterator[DoneRow]:
        """Each as a line of the error file, in the order in which they were added."""
        self._file.seek(0)
        for record in self._file:
            row, message, code, param, custom_id = json.loads(record)
            yield DoneRow(row, True, error_line(job_id, row, custom_id, message, code=code, param=param))

    def close(self) -> None:
        """Lets the file go."""
        self._file.close()


def refused(index: Index, name: str, what: str) -> Refused:
    """Of an input that holds invalid lines: what is wrong with each that is shown, and what comes of it."""
    shown = [problem.render(name) for problem in index.problems]
    more = f" (the first {len(shown)} are shown)" if index.problem_count > len(shown) else ""
    count = f"{index.problem_count:,} of {index.total_rows:,} lines are invalid{more}"
    errors = (JobError(code=one.code, message=one.message, line=one.line, param=one.param) for one in index.problems)
    return Refused(errors, *shown, f"{count}: {what}")
