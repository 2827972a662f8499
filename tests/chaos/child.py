"""`python -m tests.chaos.child`: the stub engine, whose answers say by which adapter they were computed, and which
keeps a log of every row that it computed (in the file STUB_RAN). STUB_SLOW_PASSES: how many passes SLOW takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from loramill.worker import child
from loramill.worker.request import Request, Result
from loramill.worker.serving import Served
from loramill.worker.settings import ModelOptions
from tests import stub_engine
from tests.stub_engine import StubEngine, manifest, open_stub


class TellingEngine(StubEngine):
    """Answers `ADAPTER ok:PROMPT`, with `stub` for the base."""

    def __init__(self) -> None:
        self._names = {one.sha256: one.name for one in manifest()[0].adapters}
        super().__init__(self._names)
        self._asked: dict[int, Request] = {}
        self._log = os.open(os.environ["STUB_RAN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def add(self, request: Request) -> None:
        super().add(request)
        self._asked[request.key] = request

    def step(self, on_start: Callable[[Sequence[int]], None] | None = None) -> list[Result]:
        results = super().step(on_start)
        asked = [self._asked.pop(result.key) for result in results]
        if asked:
            os.write(self._log, b"".join(bytes(request.prompt) + b"\n" for request in asked))
        return [self._signed(request, result) for request, result in zip(asked, results, strict=True)]

    def _signed(self, request: Request, result: Result) -> Result:
        names = "+".join(self._names[sha256] for sha256, _ in request.mix) or "stub"
        sign = [*f"{names} ".encode()]
        said = [replace(one, token_ids=[*sign, *one.token_ids]) for one in result.completions]
        return replace(result, completions=said)


def open_telling(options: ModelOptions) -> Served:
    """The stub's, with that engine."""
    return replace(open_stub(options), engine=TellingEngine())


if __name__ == "__main__":
    stub_engine.SLOW_PASSES = int(os.environ.get("STUB_SLOW_PASSES", stub_engine.SLOW_PASSES))
    child.BEAT_S = 0.2  # a lease is shorter here than elsewhere
    child.main(open_telling)
