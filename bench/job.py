"""The benchmark's jobs: a model, its adapters and a shuffled file of rows, the same bytes for the same `Spec`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import ROOT

FORMAT = 1
"""Part of the cache key: raised whenever the files made from one `Spec` change."""

TINY = ROOT / "examples" / "tiny"
TINY_VOCAB = 256
"""Of the tiny model's tokens, those that are bytes."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What is run. The default is a Qwen2 shape of 100.7M parameters: 75.5M in layers, 25.2M in the tied embedding."""

    layers: int = 12
    rows: int = 128
    hidden: int = 768
    intermediate: int = 2048
    heads: int = 12
    kv_heads: int = 4
    vocab: int = 32768
    adapters: int = 16
    rank: int = 16
    alpha: int = 32
    zipf: float = 1.0
    prompt_tokens: int = 147
    output_tokens: int = 64
    seed: int = 0
    least_rank: int = 0
    """Where set, ranks go from this to `rank` by doubling, adapter by adapter; `least_prompt_tokens` and
    `least_output_tokens` are where lengths, drawn evenly, begin. 0: all are alike."""
    least_prompt_tokens: int = 0
    least_output_tokens: int = 0
    shared_tokens: int = 0
    """Of each prompt's tokens, how many all rows of its adapter begin with."""
    tiny: bool = False
    """The trained model and adapters of examples/tiny in place of random ones; shape and ranks are then theirs."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven projections of one layer: module path -> (out_features, in_features)."""
        key_value = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def parameters(self) -> int:
        """Parameters of the base's weight matrices (norms and biases are left out)."""
        return self.vocab * self.hidden + self.layers * sum(out * inp for out, inp in self.linears().values())

    def ranks(self) -> list[int]:
        """Of every adapter."""
        rank, ranks = self.least_rank or self.rank, []
        for _ in range(self.adapters):
            ranks.append(rank)
            rank = rank * 2 if rank * 2 <= self.rank else self.least_rank or self.rank
        return ranks

    def longest(self) -> int:
        """Most tokens of a row, prompt and answer."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the job."""

    custom_id: str
    adapter: str
    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Job:
    """A prepared `Spec`: files under `folder`, which is a cache entry that is only ever whole."""

    spec: Spec
    folder: Path

    @property
    def base(self) -> Path:
        return TINY / "base" if self.spec.tiny else self.folder / "base"

    @property
    def adapters(self) -> Path:
        """Folder of PEFT adapters, one sub-folder each, named after the adapter."""
        return TINY / "adapters" if self.spec.tiny else self.folder / "adapters"

    @property
    def adapter_names(self) -> list[str]:
        return adapter_names(self.spec)

    def input_file(self, *, lora: bool) -> Path:
        """The rows as OpenAI batch lines; without `lora` the same rows, all for the base."""
        return self.folder / ("rows.jsonl" if lora else "rows-base.jsonl")

    def rows(self) -> list[Row]:
        lines = map(json.loads, self.input_file(lora=True).read_text().splitlines())
        return [_row(line["custom_id"], line["body"]) for line in lines]


def adapter_names(spec: Spec) -> list[str]:
    if spec.tiny:
        return sorted(folder.name for folder in (TINY / "adapters").iterdir())[: spec.adapters]
    return [f"a{number:02d}" for number in range(spec.adapters)]


def zipf_counts(rows: int, adapters: int, exponent: float) -> list[int]:
    """Rows of each adapter, most popular first, as 1 / place**exponent by largest remainders; they sum to `rows`."""
    weights = [(k + 1) ** -exponent for k in range(adapters)]
    exact = [rows * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(adapters), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: rows - sum(counts)]:
        counts[k] += 1
    return counts


def make_rows(spec: Spec) -> list[Row]:
    """The shuffled rows. A prompt is random token ids, after those that its adapter's rows share."""
    draw, lengths, shared = (random.Random(f"{spec.seed} {part}" if part else spec.seed) for part in range(3))
    counts = zipf_counts(spec.rows, spec.adapters, spec.zipf)
    names = [name for name, count in zip(adapter_names(spec), counts, strict=True) for _ in range(count)]
    draw.shuffle(names)
    begins = {name: _tokens(shared, spec, spec.shared_tokens) for name in adapter_names(spec)}
    rows = []
    for number, name in enumerate(names):
        prompt, output = (
            lengths.randint(least or most, most)
            for least, most in (
                (spec.least_prompt_tokens, spec.prompt_tokens),
                (spec.least_output_tokens, spec.output_tokens),
            )
        )
        own = _tokens(draw, spec, prompt - spec.shared_tokens)
        rows.append(Row(f"row-{number}", name, begins[name] + own, output))
    return rows


def _tokens(draw: random.Random, spec: Spec, count: int) -> list[int]:
    vocab = TINY_VOCAB if spec.tiny else spec.vocab
    return [draw.randrange(vocab) for _ in range(count)]


def prepare(spec: Spec, cache: Path) -> Job:
    """Return the job of `spec`, made under `cache` unless it is there already."""
    key = hashlib.sha256(json.dumps([FORMAT, asdict(spec)]).encode()).hexdigest()[:12]
    shape = "tiny" if spec.tiny else f"qwen2-{spec.layers}x{spec.hidden}"
    job = Job(spec, cache / f"{shape}-{spec.rows}rows-{key}")
    if job.folder.exists():
        return job
    making = cache / f"{job.folder.name}.making-{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    (cache / ".gitignore").write_text("*\n")
    if not spec.tiny:
        from bench.job_files import write_adapters, write_base

        write_base(spec, making / "base")
        write_adapters(spec, adapter_names(spec), making / "adapters")
    _write_rows(Job(spec, making))
    making.rename(job.folder)
    return job


def describe(job: Job) -> dict[str, Any]:
    """The job in plain values, for the results file."""
    rows = job.rows()
    popularity = Counter(row.adapter for row in rows)
    return {
        **asdict(job.spec),
        "all_prompt_tokens": sum(len(row.prompt) for row in rows),
        "all_output_tokens": sum(row.output_tokens for row in rows),
        "parameters": job.spec.parameters(),
        "dtype": "bfloat16",
        "targets": "all seven linear projections",
        "rows_per_adapter": [popularity[name] for name in job.adapter_names],
    }


def _write_rows(job: Job) -> None:
    rows = make_rows(job.spec)
    for lora in (True, False):
        lines = "".join(json.dumps(_batch_line(row, lora)) + "\n" for row in rows)
        job.input_file(lora=lora).write_text(lines)


def _batch_line(row: Row, lora: bool) -> dict[str, Any]:
    body = {
        "model": row.adapter if lora else "base",
        "prompt": row.prompt,
        "max_tokens": row.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return {"custom_id": row.custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def _row(custom_id: str, body: dict[str, Any]) -> Row:
    return Row(custom_id, body["model"], body["prompt"], body["max_tokens"])
