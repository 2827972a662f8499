"""The interface that every runner keeps, and the table of runners by name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.job import Job


@dataclass(slots=True)
class Answers:
    """What one run gave: output token ids by `custom_id`, and the seconds that they took, model loading left out."""

    run_s: float
    tokens: dict[str, list[int]]
    load_s: float | None = None
    """Where the runner knows it better than a clock around `load`."""
    peak_bytes: int | None = None
    """Most memory of the program and its children, where the runner watched it."""
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

    def python(self) -> Path:
        """The interpreter of its process."""
        return Path(sys.executable)

    def environment(self) -> dict[str, str]:
        """Variables that its process needs."""
        return {}

    def load(self, job: Job) -> None:
        """Everything that is not timed."""

    def run(self, job: Job) -> Answers:
        """Answer every row of `job` and time it."""


def runners() -> dict[str, Runner]:
    """Every runner by name, in the order of a round."""
    from bench.peers.hugging_face import PeftGrouped, PeftMixed, Transformers, TransformersContinuous
    from bench.peers.ours import Loramill
    from bench.peers.vllm import Vllm

    every: list[Runner] = [
        Transformers(),
        TransformersContinuous(),
        Vllm(),
        Loramill("loramill-base", "no LoRA"),
        Loramill("loramill", "dynamic", mode="dynamic"),
        Loramill("loramill-8", "dynamic, 8 slots", slots=8),
        Loramill("loramill-16", "dynamic, 16 slots", slots=16),
        Loramill("loramill-static", "static", mode="static"),
        Loramill("loramill-auto", "auto", mode="auto"),
        Loramill("loramill-unshared", "dynamic, no prefix sharing", mode="dynamic", flags=("--no-prefix-sharing",)),
        PeftMixed(),
        PeftGrouped(),
        Vllm(4),
        Vllm(8),
        Vllm(16),
    ]
    return {runner.name: runner for runner in every}


PEERS = ("vllm", "vllm-4", "vllm-8", "vllm-16")
"""Runners with environments of their own, which `make bench` leaves out and `make bench-peers` has."""

REFERENCES = {False: "transformers", True: "peft-mixed"}
"""By `Runner.lora`: the runner whose tokens the others are compared with."""
