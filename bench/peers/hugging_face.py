"""transformers and PEFT: `generate` over static batches, as their users write it, and continuous batching."""

from __future__ import annotations

import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from bench.job import Job, Row
from bench.peers.runner import Answers, Runner

BATCH_ROWS = 128
"""Rows of one `generate` call at most on a CPU; every runner here gets the same."""


class _Runner(Runner):
    """What they share: where they run, and how many rows one `generate` gets."""

    lora = False

    def __init__(self, device: str = "cpu", batch_rows: int = BATCH_ROWS) -> None:
        self.device = device
        self.batch_rows = batch_rows

    def absent(self) -> str | None:
        return _missing("peft" if self.lora else "transformers")

    def load(self, job: Job) -> None:
        self.model = (_with_adapters if self.lora else _base)(job, self.device)


class Transformers(_Runner):
    """No LoRA: the base answers every row."""

    name = "transformers"
    title = "transformers generate, no LoRA"

    def run(self, job: Job) -> Answers:
        return _timed(job, lambda rows: _generate(self.model, rows, self.batch_rows))


class TransformersContinuous(_Runner):
    """No LoRA: the manager behind `generate_batch`, which puts a new row where one has ended; rows have own lengths."""

    name = "transformers-continuous"
    title = "transformers continuous batching, no LoRA"

    def run(self, job: Job) -> Answers:
        return _timed(job, lambda rows: self._continuous(job, rows))

    def _continuous(self, job: Job, rows: Sequence[Row]) -> dict[str, list[int]]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        # On a device it takes what is free there; on a CPU that is most of the machine's memory, and filled with zeros.
        pages = min(len(rows), self.batch_rows) * (-(-job.spec.longest() // PAGE_TOKENS) + 1)
        sizes = {"page_size": PAGE_TOKENS, "num_blocks": pages, "max_batch_tokens": BATCH_TOKENS}
        config = ContinuousBatchingConfig(
            max_requests_per_batch=self.batch_rows, **(sizes if self.device == "cpu" else {})
        )
        longest = GenerationConfig(
            max_new_tokens=job.spec.output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        tokens: dict[str, list[int]] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=longest, continuous_batching_config=config, block=True
        ) as manager:
            for row in rows:
                manager.add_request(row.prompt, request_id=row.custom_id, max_new_tokens=row.output_tokens)
            while len(tokens) < len(rows):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    tokens[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("its thread ended before every row was answered")
        return tokens


class PeftMixed(_Runner):
    """Every adapter loaded; each row of a batch names its own."""

    name = "peft-mixed"
    title = "PEFT, mixed batch"
    lora = True

    def run(self, job: Job) -> Answers:
        return _timed(job, lambda rows: _generate(self.model, rows, self.batch_rows, mixed=True))


class PeftGrouped(_Runner):
    """Every adapter loaded; one `generate` for each adapter's rows, with only that adapter active."""

    name = "peft-grouped"
    title = "PEFT, grouped by adapter"
    lora = True

    def run(self, job: Job) -> Answers:
        return _timed(job, self._by_adapter)

    def _by_adapter(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            groups[row.adapter].append(row)
        tokens: dict[str, list[int]] = {}
        for adapter, group in groups.items():
            self.model.set_adapter(adapter)
            tokens |= _generate(self.model, group, self.batch_rows)
        return tokens


PAGE_TOKENS, BATCH_TOKENS = 32, 8192
"""Of continuous batching on a CPU: its page and the tokens of one pass, which loramill has too by default."""


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


def _generate(model: Any, rows: Sequence[Row], batch_rows: int, *, mixed: bool = False) -> dict[str, list[int]]:
    """Greedy tokens of `rows`, `batch_rows` at a time, those of like lengths together: a batch is padded on the left
    to its longest prompt, and runs until its longest answer is done."""
    import torch

    rows = sorted(rows, key=lambda row: (row.output_tokens, len(row.prompt)))
    tokens: dict[str, list[int]] = {}
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        longest = max(len(row.prompt) for row in batch)
        padding = [longest - len(row.prompt) for row in batch]
        prompts = [[0] * pad + row.prompt for pad, row in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * len(row.prompt) for pad, row in zip(padding, batch, strict=True)]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(prompts, device=model.device),  # (rows, longest prompt)
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max(row.output_tokens for row in batch),
                do_sample=False,
                **({"adapter_names": [row.adapter for row in batch]} if mixed else {}),
            )
        new = output[:, longest:].tolist()
        tokens |= {row.custom_id: ids[: row.output_tokens] for row, ids in zip(batch, new, strict=True)}
    return tokens
