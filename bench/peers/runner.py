"""The interface that every runner keeps, and the table of runners by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from bench.job import Job


@dataclass(slots=True)
class Answers:
    """What one run gave: output token ids by `custom_id`, and the seconds that they took, model loading left out."""

    run_s: float
    tokens: dict[str, list[int]]
    load_s: float | None = None
    """Where the runner knows it better than a clock around `load`."""
    details: dict[str, object] = field(default_factory=dict)
    """What else the runner says about the run; kept in the results, never compared."""


class Runner(Protocol):
    """One way to run the job. It lives in a process of its own, which loads once and runs once."""

    name: str
    title: str
    """For tables."""
    lora: bool
    """Whether each row is answered by its adapter; otherwise all by the base."""

    def absent(self) -> str | None:
        """Why it cannot run on this machine; None if it can."""

    def load(self, job: Job) -> None:
        """Everything that is not timed."""

    def run(self, job: Job) -> Answers:
        """Answer every row of `job` and time it."""


def runners() -> dict[str, Runner]:
    """Every runner by name, in the order of a round."""
    from bench.peers.hugging_face import PeftGrouped, PeftMixed, Transformers
    from bench.peers.ours import Loramill

    every: list[Runner] = [
        Transformers(),
        Loramill(),
        Loramill(slots=8),
        Loramill(slots=16),
        PeftMixed(),
        PeftGrouped(),
    ]
    return {runner.name: runner for runner in every}


REFERENCES = {False: "transformers", True: "peft-mixed"}
"""By `Runner.lora`: the runner whose tokens the others are compared with."""
