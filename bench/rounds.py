"""Interleaved repeats: each runner once a round in a clean process, its tokens checked before its time counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.figures import agreement, check_agreement, check_counts, ratios, spread
from bench.job import Job
from bench.machine import threads, watch_others
from bench.peers.runner import REFERENCES, runners

NOISE_CORES = 0.1
"""Cores busy with other processes from which on a run is called noisy."""


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
    agreement: dict[str, float] = field(default_factory=dict)
    """With the reference runner of its kind, in the first round."""
    details: dict[str, Any] = field(default_factory=dict)
    """Of the first round."""


def measure(job: Job, names: list[str], repeats: int, minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Run `names` in turn, `repeats` times; no round starts that would pass `minutes`. Returns plain results."""
    started = time.monotonic()
    every = runners()
    absent = {name: reason for name in names if (reason := every[name].absent())}
    for name, reason in absent.items():
        say(f"{name}: absent: {reason}")
    measured = {name: Measured(every[name].title, every[name].lora) for name in names if name not in absent}
    for number in range(repeats):
        spent = time.monotonic() - started
        if number and spent / number * (number + 1) > minutes * 60:
            say(f"stopped after {number} of {repeats} rounds: another would pass {minutes:g} minutes")
            break
        _round(job, measured, f"round {number + 1}/{repeats}", say)
    return summarise(job, measured) | {"absent": absent}


def _round(job: Job, measured: dict[str, Measured], label: str, say: Callable[[str], None]) -> None:
    """One run of each, in order; nothing of the round counts unless every runner's tokens are as asked."""
    ids = [row.custom_id for row in job.rows()]
    answers: dict[str, dict[str, Any]] = {}
    for name in measured:
        with watch_others() as others:
            answers[name] = run_once(job, name)
        answers[name]["others"] = others
        check_counts(name, answers[name]["tokens"], ids, job.spec.output_tokens)
        noise = f" ({others[0]:.1f} cores busy with other processes)" if others and others[0] > NOISE_CORES else ""
        say(f"{label}: {name}: {answers[name]['run_s']:.2f} s{noise}")
    for name, entry in measured.items():
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


def run_once(job: Job, name: str) -> dict[str, Any]:
    """The answers of one runner from a process of its own, as `bench.child` writes them; raises `RunnerError`."""
    count = str(threads())
    quiet = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        spec = json.dumps(asdict(job.spec))
        command = [sys.executable, "-m", "bench.child", name, spec, str(job.folder.parent.resolve()), str(out)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RunnerError(f"{name} failed:\n{done.stderr[-2000:].strip()}")
        return json.loads(out.read_text())


def summarise(job: Job, measured: dict[str, Measured]) -> dict[str, Any]:
    """Every repeat's seconds, their medians, output rates, and ratios by round."""
    output_tokens = job.spec.rows * job.spec.output_tokens
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
