"""Interleaved repeats: each runner once a round in a clean process, its tokens checked before its time counts."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.child import ENTRY
from bench.figures import agreement, check_agreement, check_counts, ratios, spread
from bench.job import Job, Row
from bench.machine import adopt, reap, threads, watch_others
from bench.peers.runner import REFERENCES, Runner, runners

NOISE_CORES = 0.1
"""Cores busy with other processes from which on a run is called noisy."""

Say = Callable[[str], None]


class RunnerError(Exception):
    """A runner's process failed; the message ends with what it last said."""


@dataclass(slots=True)
class Measured:
    """What one runner gave, one entry per round."""

    title: str
    lora: bool
    run_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    others_cores: list[float] = field(default_factory=list)
    """Cores kept busy by other processes meanwhile."""
    peak_bytes: list[int] = field(default_factory=list)
    """Of the runners that watch it."""
    agreement: dict[str, float] = field(default_factory=dict)
    """With the reference runner of its kind, in the first round."""
    details: dict[str, Any] = field(default_factory=dict)
    """Of the first round."""


class Race:
    """One job and the runners that answer it, round by round."""

    def __init__(self, name: str, job: Job, names: Sequence[str], say: Say) -> None:
        """`names` of runners; those that cannot run here are told and left out."""
        every = runners()
        self.name, self.job, self._say, self._rows = name, job, say, job.rows()
        self.absent = {name: reason for name in names if (reason := every[name].absent())}
        for runner, reason in self.absent.items():
            say(f"{name}: {runner}: absent: {reason}")
        self._runners: dict[str, Runner] = {name: every[name] for name in names if name not in self.absent}
        self.measured = {name: Measured(one.title, one.lora) for name, one in self._runners.items()}
        self.rounds = 0
        self.round_s = 0.0
        """Of the longest round, loading included."""

    def round(self) -> None:
        """One run of each, in order; nothing of the round counts unless every runner's tokens are as asked.

        Raises:
            RunnerError, TokensError: a runner failed, or did not answer what was asked.
        """
        began = time.monotonic()
        answers = {name: self._run(name, runner) for name, runner in self._runners.items()}
        for name, entry in self.measured.items():
            answer = answers[name]
            reference = answers.get(REFERENCES[entry.lora])
            agreed = agreement(answer["tokens"], reference["tokens"]) if reference else {}
            if reference:
                check_agreement(name, agreed)
            if not entry.run_s:
                entry.details, entry.agreement = answer["details"], agreed
            entry.run_s.append(answer["run_s"])
            entry.load_s.append(answer["load_s"])
            entry.others_cores += answer["others"]
            entry.peak_bytes += [answer["peak_bytes"]] if answer["peak_bytes"] else []
        self.rounds += 1
        self.round_s = max(self.round_s, time.monotonic() - began)

    def _run(self, name: str, runner: Runner) -> dict[str, Any]:
        with watch_others() as others:
            answer = run_once(self.job, runner)
        answer["others"] = others
        asked = [row.custom_id for row in self._rows]
        check_counts(name, answer["tokens"], asked, [row.output_tokens for row in self._rows])
        noise = f" ({others[0]:.1f} cores busy with other processes)" if others and others[0] > NOISE_CORES else ""
        self._say(f"{self.name}, round {self.rounds + 1}: {name}: {answer['run_s']:.2f} s{noise}")
        return answer

    def summary(self) -> dict[str, Any]:
        """Every repeat's seconds, their medians, output rates, and ratios by round, in plain values."""
        return summarise(self._rows, self.measured) | {"absent": self.absent}


def measure(races: Sequence[Race], repeats: int, minutes: float, say: Say, keep: Callable[[Race], None]) -> None:
    """Rounds over all `races` in turn, so that each meets the machine's every mood; `keep` is called after each.

    No race begins a round that would pass `minutes`, by how long its rounds took before.
    """
    started = time.monotonic()
    adopt()
    for number in range(repeats):
        for race in races:
            if not race.measured:
                continue
            if time.monotonic() - started + race.round_s > minutes * 60:
                say(f"{race.name}: no round {number + 1} of {repeats}: it would pass {minutes:g} minutes")
                continue
            race.round()
            keep(race)


def run_once(job: Job, runner: Runner) -> dict[str, Any]:
    """The answers of one runner from a process of its own, as `bench.child` writes them; raises `RunnerError`."""
    count = str(threads())
    quiet = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        spec = json.dumps(asdict(job.spec))
        cache = str(job.folder.parent.resolve())
        done = subprocess.run(
            [runner.python(), "-c", ENTRY, runner.name, spec, cache, out],
            cwd=ROOT,
            env={**os.environ, **quiet, **runner.environment()},
            capture_output=True,
            text=True,
            check=False,
        )
        reap()
        if done.returncode:
            raise RunnerError(f"{runner.name} failed:\n{done.stderr[-2000:].strip()}")
        return json.loads(out.read_text())


def summarise(rows: Sequence[Row], measured: dict[str, Measured]) -> dict[str, Any]:
    """What `Race.summary` says of its runners."""
    output_tokens = sum(row.output_tokens for row in rows)
    return {
        "runners": {
            name: asdict(entry)
            | {
                "seconds": asdict(spread(entry.run_s)),
                "output_tokens_per_s": asdict(spread([output_tokens / seconds for seconds in entry.run_s])),
            }
            for name, entry in measured.items()
        },
        "ratios": {
            pair: {"rounds": values, **asdict(spread(values))}
            for pair, values in ratios({name: entry.run_s for name, entry in measured.items()}).items()
        },
    }
