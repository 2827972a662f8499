"""The benchmark's job: a random model, its adapters and a shuffled file of rows, the same bytes for the same `Spec`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Part of the cache key: raised whenever the files made from one `Spec` change."""

BASE_STD = 0.03
"""Of the base's weights. At the usual 0.02 a greedy answer is one token repeated; at 0.05 rounding decides more."""

ADAPTER_STD = 0.025
"""Of A and B: scale * BA is then a sixth of the base's spread, which changes answers and keeps numbers sane."""


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


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the job."""

    custom_id: str
    adapter: str
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Job:
    """A prepared `Spec`: files under `folder`, which is a cache entry that is only ever whole."""

    spec: Spec
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapters(self) -> Path:
        """Folder of PEFT adapters, one sub-folder each, named after the adapter."""
        return self.folder / "adapters"

    @property
    def adapter_names(self) -> list[str]:
        return adapter_names(self.spec)

    def input_file(self, *, lora: bool) -> Path:
        """The rows as OpenAI batch lines; without `lora` the same rows, all for the base."""
        return self.folder / ("rows.jsonl" if lora else "rows-base.jsonl")

    def rows(self) -> list[Row]:
        lines = map(json.loads, self.input_file(lora=True).read_text().splitlines())
        return [Row(line["custom_id"], line["body"]["model"], line["body"]["prompt"]) for line in lines]


def adapter_names(spec: Spec) -> list[str]:
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
    """The shuffled rows. A prompt is random token ids of one length, so that padding costs no peer anything."""
    draw = random.Random(spec.seed)
    counts = zipf_counts(spec.rows, spec.adapters, spec.zipf)
    names = [name for name, count in zip(adapter_names(spec), counts, strict=True) for _ in range(count)]
    draw.shuffle(names)
    return [
        Row(f"row-{number}", name, [draw.randrange(spec.vocab) for _ in range(spec.prompt_tokens)])
        for number, name in enumerate(names)
    ]


def prepare(spec: Spec, cache: Path) -> Job:
    """Return the job of `spec`, made under `cache` unless it is there already."""
    key = hashlib.sha256(json.dumps([FORMAT, asdict(spec)]).encode()).hexdigest()[:12]
    job = Job(spec, cache / f"qwen2-{spec.layers}x{spec.hidden}-{spec.rows}rows-{key}")
    if job.folder.exists():
        return job
    making = cache / f"{job.folder.name}.making-{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    (cache / ".gitignore").write_text("*\n")
    _write(Job(spec, making))
    making.rename(job.folder)
    return job


def describe(job: Job) -> dict[str, Any]:
    """The job in plain values, for the results file."""
    popularity = Counter(row.adapter for row in job.rows())
    return {
        **asdict(job.spec),
        "parameters": job.spec.parameters(),
        "dtype": "bfloat16",
        "targets": "all seven linear projections",
        "rows_per_adapter": [popularity[name] for name in job.adapter_names],
    }


def _write(job: Job) -> None:
    """Fill the job's folder."""
    import torch

    _write_base(job.spec, job.base)
    generator = torch.Generator().manual_seed(job.spec.seed + 1)
    for name in job.adapter_names:
        _write_adapter(job.spec, job.adapters / name, generator)
    rows = make_rows(job.spec)
    for lora in (True, False):
        lines = "".join(json.dumps(_batch_line(job.spec, row, lora)) + "\n" for row in rows)
        job.input_file(lora=lora).write_text(lines)


def _batch_line(spec: Spec, row: Row, lora: bool) -> dict[str, Any]:
    body = {
        "model": row.adapter if lora else "base",
        "prompt": row.prompt,
        "max_tokens": spec.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return {"custom_id": row.custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def _write_base(spec: Spec, folder: Path) -> None:
    """A randomly initialised Qwen2 in bfloat16 and its tokenizer, as `save_pretrained` leaves them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen2Config(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=BASE_STD,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    _tokenizer(spec.vocab).save_pretrained(folder)


def _tokenizer(vocab: int) -> Any:
    """A byte-level tokenizer: ids below 256 are single bytes, the rest two bytes that no merge produces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = (first + second for first in alphabet for second in alphabet)
    tokens = [*alphabet, *(token for _, token in zip(range(vocab - len(alphabet)), pairs, strict=False))]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _write_adapter(spec: Spec, folder: Path, generator: torch.Generator) -> None:
    """A PEFT adapter on every linear projection, random in A and in B."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(dict(_adapter_tensors(spec, generator)), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(path.rpartition(".")[2] for path in spec.linears()),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _adapter_tensors(spec: Spec, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for layer in range(spec.layers):
        for path, (out_features, in_features) in spec.linears().items():
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            for side, shape in (("A", (spec.rank, in_features)), ("B", (out_features, spec.rank))):
                weight = torch.randn(shape, generator=generator) * ADAPTER_STD
                yield f"{prefix}.lora_{side}.weight", weight.to(torch.bfloat16)
