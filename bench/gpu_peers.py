"""`python -m bench.gpu_peers`: loramill, transformers' continuous batching and PEFT on one job on this GPU, in turn.

Each is loaded alone and warmed up on a few rows first, so that nothing is compiled while the clock runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, hide_root
from bench.figures import TokensError, agreement, check_agreement, check_counts
from bench.gpu_engine import BATCH_ROWS, SLOTS, say
from bench.gpu_job import SPEC, first, prepare, setting, warm_up
from bench.job import Job
from bench.parts import describe_part, no_device, save_part
from bench.peers.engine import EngineRunner
from bench.peers.hugging_face import PeftMixed, Transformers
from bench.peers.runner import Answers, Runner

CONTINUOUS_ROWS = 1000
PEFT_ROWS = 256
"""Rows of PEFT, one batch: it multiplies adapter by adapter, module by module, and all rows would pass the limit."""
REFERENCES = {False: "transformers-continuous", True: "peft-mixed"}
"""By `Runner.lora`: the runner whose tokens the others are compared with."""


class Continuous(Transformers):
    """No LoRA: transformers' own scheduler, paged cache and CUDA graphs, sized by itself."""

    name = "transformers-continuous"
    title = "transformers continuous batching, no LoRA"

    def run(self, job: Job) -> Answers:
        from transformers import GenerationConfig

        rows, tokens = job.rows(), {}
        # No token has this number, so every row runs to its last token.
        how = GenerationConfig(max_new_tokens=job.spec.output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self.model.continuous_batching_context_manager(generation_config=how, block=True) as manager:
            started = time.perf_counter()
            for row in rows:
                manager.add_request(row.prompt, request_id=row.custom_id, max_new_tokens=job.spec.output_tokens)
            while len(tokens) < len(rows):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    tokens[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("its thread ended before every row was answered")
            return Answers(time.perf_counter() - started, tokens)


def runners(device: str) -> list[tuple[Runner, int]]:
    """Each runner with the rows it gets, the quick ones first."""
    return [
        (EngineRunner(0, device, BATCH_ROWS), SPEC.rows),
        (EngineRunner(SLOTS, device, BATCH_ROWS), SPEC.rows),
        (Continuous(device, BATCH_ROWS), CONTINUOUS_ROWS),
        (PeftMixed(device, BATCH_ROWS), PEFT_ROWS),
    ]


def run_one(runner: Runner, job: Job, rows: int) -> Answers:
    """Load, warm up, and time the first `rows` rows."""
    part, started = first(job, rows), time.perf_counter()
    runner.load(job)
    runner.run(warm_up(job))
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
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_peers", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="start no runner after this (default 5)")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where the model and job are made")
    options = parser.parse_args(arguments)
    if no_device("peers"):
        return 1
    device, started = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic()
    job = prepare(SPEC, options.dir, device)
    say(f"made the job in {time.monotonic() - started:.0f} s")
    result = describe_part("peers", ["python -m bench.gpu_peers", *map(str, arguments)])
    result |= {"setting": setting(SPEC), "job": asdict(SPEC), "runners": {}, "absent": {}}
    ran: dict[str, tuple[Runner, Answers]] = {}
    for runner, rows in runners(device):
        reason = runner.absent()
        if not reason and time.monotonic() - started > options.minutes * 60:
            reason = f"{options.minutes:g} minutes had passed"
        if reason:
            result["absent"][runner.name] = reason
            continue
        ran[runner.name] = runner, run_one(runner, job, rows)
        say(f"{runner.name}: {ran[runner.name][1].run_s:.2f} s for {rows} rows")
        drop(runner)
        try:
            result["runners"] = {name: summary(*one, _reference(ran, one[0]), job) for name, one in ran.items()}
        except TokensError as error:
            say(str(error))
            return 1
        save_part(result)  # each time: what is stopped has what it measured until then
    print(json.dumps({name: one["output_tokens_per_s"] for name, one in result["runners"].items()}))
    say(f"written to {save_part(result)}")
    return 0


def _reference(ran: Mapping[str, tuple[Runner, Answers]], runner: Runner) -> Answers | None:
    found = ran.get(REFERENCES[runner.lora])
    return found[1] if found else None


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
