"""transformers and PEFT: `generate` over static batches, as their users write it."""

from __future__ import annotations

import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from bench.job import Job, Row
from bench.peers.runner import Answers

BATCH_ROWS = 128
"""Rows of one `generate` call at most on a CPU; every runner here gets the same."""


class _Runner:
    """What the three share: where they run, and how many rows one `generate` gets."""

    def __init__(self, device: str = "cpu", batch_rows: int = BATCH_ROWS) -> None:
        self.device = device
        self.batch_rows = batch_rows


class Transformers(_Runner):
    """No LoRA: the base answers every row."""

    name = "transformers"
    title = "transformers generate, no LoRA"
    lora = False

    def absent(self) -> str | None:
        return _missing("transformers")

    def load(self, job: Job) -> None:
        self.model = _base(job, self.device)

    def run(self, job: Job) -> Answers:
        return _timed(job, lambda rows: _generate(self.model, job, rows, self.batch_rows))


class PeftMixed(_Runner):
    """Every adapter loaded; each row of a batch names its own."""

    name = "peft-mixed"
    title = "PEFT, mixed batch"
    lora = True

    def absent(self) -> str | None:
        return _missing("peft")

    def load(self, job: Job) -> None:
        self.model = _with_adapters(job, self.device)

    def run(self, job: Job) -> Answers:
        return _timed(job, lambda rows: self._mixed(job, rows))

    def _mixed(self, job: Job, rows: Sequence[Row]) -> dict[str, list[int]]:
        return _generate(self.model, job, rows, self.batch_rows, adapter_names=[row.adapter for row in rows])


class PeftGrouped(_Runner):
    """Every adapter loaded; one `generate` for each adapter's rows, with only that adapter active."""

    name = "peft-grouped"
    title = "PEFT, grouped by adapter"
    lora = True

    def absent(self) -> str | None:
        return _missing("peft")

    def load(self, job: Job) -> None:
        self.model = _with_adapters(job, self.device)

    def run(self, job: Job) -> Answers:
        return _timed(job, lambda rows: self._by_adapter(job, rows))

    def _by_adapter(self, job: Job, rows: Sequence[Row]) -> dict[str, list[int]]:
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            groups[row.adapter].append(row)
        tokens: dict[str, list[int]] = {}
        for adapter, group in groups.items():
            self.model.set_adapter(adapter)
            tokens |= _generate(self.model, job, group, self.batch_rows)
        return tokens


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _timed(job: Job, answer: Callable[[Sequence[Row]], dict[str, list[int]]]) -> Answers:
    rows = job.rows()
    start = time.perf_counter()
    tokens = answer(rows)
    return Answers(run_s=time.perf_counter() - start, tokens=tokens)


def _base(job: Job, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(device).eval()
    # No end of sequence, so that every row runs to its last token without a logits processor in the way.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _with_adapters(job: Job, device: str) -> Any:
    """The base under PEFT with every adapter.

    They stay in bfloat16: PEFT's own default is to raise them to float32, which was slower (63.6 s against 60.8 for
    the mixed batch, once).
    """
    from peft import PeftModel

    first, *others = job.adapter_names
    options: dict[str, Any] = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
    model = PeftModel.from_pretrained(_base(job, device), job.adapters / first, adapter_name=first, **options)
    for name in others:
        model.load_adapter(job.adapters / name, adapter_name=name, **options)
    return model.eval()


def _generate(model: Any, job: Job, rows: Sequence[Row], batch_rows: int, **arguments: Any) -> dict[str, list[int]]:
    """Greedy tokens of `rows`, `batch_rows` at a time; the prompts have one length, so nothing is padded."""
    import torch

    tokens: dict[str, list[int]] = {}
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        per_row = {name: values[start : start + batch_rows] for name, values in arguments.items()}
        prompts = torch.tensor([row.prompt for row in batch], device=model.device)  # (rows, prompt tokens)
        with torch.inference_mode():
            output = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=job.spec.output_tokens,
                do_sample=False,
                **per_row,
            )
        new = output[:, prompts.shape[1] :].tolist()
        tokens |= {row.custom_id: ids for row, ids in zip(batch, new, strict=True)}
    return tokens
