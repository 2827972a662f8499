"""The model and the adapters of a benchmark's job: random weights in the forms that their libraries save."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.job import Spec

if TYPE_CHECKING:
    import torch

BASE_STD = 0.03
"""Of the base's weights. At the usual 0.02 a greedy answer is one token repeated; at 0.05 rounding decides more."""

ADAPTER_STD = 0.025
"""Of A and B: scale * BA is then a sixth of the base's spread, which changes answers and keeps numbers sane."""


def write_base(spec: Spec, folder: Path) -> None:
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


def write_adapters(spec: Spec, names: list[str], folder: Path) -> None:
    """A sub-folder for each name."""
    import torch

    generator = torch.Generator().manual_seed(spec.seed + 1)
    for name, rank in zip(names, spec.ranks(), strict=True):
        _write_adapter(spec, rank, folder / name, generator)


def _write_adapter(spec: Spec, rank: int, folder: Path, generator: torch.Generator) -> None:
    """A PEFT adapter on every linear projection, random in A and in B."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(
        dict(_adapter_tensors(spec, rank, generator)), folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(path.rpartition(".")[2] for path in spec.linears()),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _adapter_tensors(spec: Spec, rank: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for layer in range(spec.layers):
        for path, (out_features, in_features) in spec.linears().items():
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                weight = torch.randn(shape, generator=generator) * ADAPTER_STD
                yield f"{prefix}.lora_{side}.weight", weight.to(torch.bfloat16)
