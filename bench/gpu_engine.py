"""`python -m bench.gpu_engine`: one job on this GPU: loramill with and without LoRA, transformers, PEFT, as JSON.

A random Qwen2 shape of 1.1 billion parameters, 64 adapters of rank 16 by Zipf, 512 rows of 512 prompt and 128 output
tokens. Every runner is warmed up on a few rows first, so that nothing is compiled while the clock runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, hide_root
from bench.figures import TokensError, agreement, check_agreement, check_counts
from bench.job import Job, Row, Spec, prepare
from bench.parts import describe_part, no_device, save_part
from bench.peers.engine import EngineRunner
from bench.peers.hugging_face import PeftMixed, Transformers
from bench.peers.runner import REFERENCES, Answers, Runner

SPEC = Spec(
    layers=24,
    rows=512,
    hidden=2048,
    intermediate=5632,
    heads=16,
    kv_heads=4,
    adapters=64,
    prompt_tokens=512,
    output_tokens=128,
)
BATCH_ROWS = 256
"""Rows that run at once, for everyone: the engine's default on CUDA."""
PEFT_ROWS = 256
"""Rows of PEFT, one batch: it multiplies adapter by adapter, module by module, and all rows would pass the limit."""
WARM_ROWS, WARM_TOKENS = 64, 4


@dataclass(frozen=True, slots=True)
class Part(Job):
    """A job's first rows, with its files and perhaps fewer tokens."""

    first: list[Row]

    def rows(self) -> list[Row]:
        return self.first


def part_of(job: Job, rows: int, output_tokens: int) -> Part:
    first = [replace(row, output_tokens=output_tokens) for row in job.rows()[:rows]]
    return Part(replace(job.spec, rows=rows, output_tokens=output_tokens), job.folder, first)


def runners(device: str) -> list[tuple[Runner, int]]:
    """Each runner with the rows it gets, the quick ones first."""
    return [
        (Transformers(device, BATCH_ROWS), SPEC.rows),
        (EngineRunner(0, device, BATCH_ROWS), SPEC.rows),
        (EngineRunner(64, device, BATCH_ROWS), SPEC.rows),
        (EngineRunner(16, device, BATCH_ROWS), SPEC.rows),
        (PeftMixed(device, BATCH_ROWS), PEFT_ROWS),
    ]


def run_one(runner: Runner, job: Job, rows: int) -> Answers:
    """Load, warm up, and time the first `rows` rows. The engine loads anew, so that no adapter is there already."""
    part = part_of(job, rows, job.spec.output_tokens)
    started = time.perf_counter()
    runner.load(job)
    runner.run(part_of(job, WARM_ROWS, WARM_TOKENS))
    if isinstance(runner, EngineRunner):
        drop(runner)
        runner.load(job)
    load_s = time.perf_counter() - started
    answers = runner.run(part)
    answers.load_s = load_s
    check_counts(runner.name, answers.tokens, [row.custom_id for row in part.rows()], job.spec.output_tokens)
    return answers


def drop(runner: Runner) -> None:
    """Free what it holds on the device."""
    vars(runner).pop("model", None)
    gc.collect()
    torch.cuda.empty_cache()


def summary(runner: Runner, answers: Answers, reference: Answers | None, job: Job) -> dict[str, Any]:
    """A runner's result in plain values; raises `TokensError` when another model answered."""
    found: dict[str, Any] = {
        "title": runner.title,
        "rows": len(answers.tokens),
        "run_s": answers.run_s,
        "load_and_warm_s": answers.load_s,
        "output_tokens_per_s": len(answers.tokens) * job.spec.output_tokens / answers.run_s,
        "details": answers.details,
    }
    if reference is not None:
        shared = {row: tokens for row, tokens in reference.tokens.items() if row in answers.tokens}
        found["agreement"] = agreement(answers.tokens, shared)
        check_agreement(runner.name, found["agreement"])
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_engine", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="start no runner after this (default 5)")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the model and job are made")
    options = parser.parse_args(arguments)
    if no_device("engine"):
        return 1
    started = time.monotonic()
    job = prepare(SPEC, options.dir)
    _say(f"made the job in {time.monotonic() - started:.0f} s")
    result = describe_part("engine", ["python -m bench.gpu_engine", *map(str, arguments)])
    result |= {"setting": setting(SPEC), "job": asdict(SPEC), "runners": {}, "absent": {}}
    ran: dict[str, tuple[Runner, Answers]] = {}
    for runner, rows in runners("cuda"):
        reason = runner.absent()
        if not reason and time.monotonic() - started > options.minutes * 60:
            reason = f"{options.minutes:g} minutes had passed"
        if reason:
            result["absent"][runner.name] = reason
            continue
        ran[runner.name] = runner, run_one(runner, job, rows)
        _say(f"{runner.name}: {ran[runner.name][1].run_s:.2f} s for {rows} rows")
        drop(runner)
        try:
            result["runners"] = {name: summary(*one, _reference(ran, one[0]), job) for name, one in ran.items()}
        except TokensError as error:
            _say(str(error))
            return 1
        save_part(result)  # each time: what is stopped has what it measured until then
    print(json.dumps({name: one["output_tokens_per_s"] for name, one in result["runners"].items()}))
    _say(f"written to {save_part(result)}")
    return 0


def setting(spec: Spec) -> str:
    """The job in one sentence."""
    return (
        f"{spec.rows} rows over {spec.adapters} adapters (Zipf {spec.zipf:g}, rank {spec.rank} on all seven linear "
        f"projections), {spec.prompt_tokens} prompt + {spec.output_tokens} output tokens a row; a random Qwen2 shape "
        f"of {spec.parameters() / 1e9:.2f}B parameters in bfloat16; one run each, after a warm-up."
    )


def _reference(ran: Mapping[str, tuple[Runner, Answers]], runner: Runner) -> Answers | None:
    found = ran.get(REFERENCES[runner.lora])
    return found[1] if found else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
