"""Rows that end: with all of their answers, or with an error."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several

from loramill.worker.answers import Answers
from loramill.worker.request import EngineStats, Request, Result
from loramill.worker.sampling import Draw
from loramill.worker.scheduler import Scheduler
from loramill.worker.sequence import Sequence

_NOT_FINITE = "the model's output was not finite (NaN or infinity)"


class Endings:
    """Ends the rows of one scheduler."""

    def __init__(self, scheduler: Scheduler, answers: Answers) -> None:
        self._scheduler, self._answers = scheduler, answers

    def take(self, drawn: Several[tuple[Sequence, Draw]], stats: EngineStats) -> list[Result]:
        """Append the drawn tokens, and count them: the rows all of whose answers are now complete, or that broke."""
        broken = {sequence.request.key: sequence.request for sequence, draw in drawn if draw.token is None}
        ended = self.fail({key: (request, _NOT_FINITE) for key, request in broken.items()}, "engine_error")
        for sequence, draw in drawn:
            if draw.token is None or sequence.request.key in broken:
                continue
            stats.completion_tokens += 1
            if self._answers.append(sequence, draw.token, draw.logprob):
                self._scheduler.finish(sequence)
                ended += self._answers.collect(sequence.request)
        return ended

    def fail_rows_of(self, adapters: Mapping[str, str]) -> list[Result]:
        """End every row that asks for an adapter that cannot be had, for which `adapters` says why."""
        rows: dict[int, tuple[Request, str]] = {}
        for sequence in (*self._scheduler.running, *self._scheduler.waiting) if adapters else ():
            why = next((adapters[adapter] for adapter, _ in sequence.request.mix if adapter in adapters), None)
            if why is not None:
                rows[sequence.request.key] = sequence.request, why
        return self.fail(rows, "adapter_unavailable")

    def fail(self, rows: Mapping[int, tuple[Request, str]], code: str) -> list[Result]:
        """End rows with an error, all of their answers, and why."""
        if rows:
            self._scheduler.cancel(rows, failed=True)
        for key in rows:
            self._answers.drop(key)
        return [Result(key, len(one.prompt), [], error=why, code=code) for key, (one, why) in rows.items()]
