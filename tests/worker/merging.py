"""Adapters with everything trained that their config lets be trained, and what PEFT and our model make of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from loramill.kernels.router import Router
from loramill.worker.batch import pack
from loramill.worker.cache import KVCache
from loramill.worker.model import BaseInfo, Model
from loramill.worker.request import Request, Sampling
from loramill.worker.room import Room
from loramill.worker.sequence import Chunk, Sequence

PROMPT = [5, 9, 11, 40, 3, 96, 17]
TOKENS = 8


def save_trained(
    folder: Path, base: Path, seed: int = 0, grow_to: int | None = None, std: float = 0.15, **config: Any
) -> Path:
    """A PEFT adapter every trainable number of which is another than at the start; tokens added up to `grow_to`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        if grow_to:
            model.resize_token_embeddings(grow_to)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "magnitude" in name:
                    parameter.mul_(1 + 3 * std * torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * std)
        adapted.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path, grow_to: int | None = None) -> Any:
    """The base with the adapter active, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        if grow_to:
            model.resize_token_embeddings(grow_to)
        return peft.PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def peft_answer(model: Any, prompt: list[int]) -> tuple[Tensor, list[int]]:
    """Logits [T, vocab] over the prompt, and the greedy tokens after it."""
    tokens = torch.tensor([prompt])
    greedy = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
        do_sample=False,
    )  # fmt: skip
    return model(input_ids=tokens).logits[0], greedy[0, len(prompt) :].tolist()


def load(base: BaseInfo, dtype: str = "float32") -> Model:
    """The base alone, as the engine loads it."""
    return Model(base, dtype, "cpu", slots=1)


def logits(model: Model, prompt: list[int]) -> Tensor:
    """Logits [T, vocab] over one prompt that goes through no adapter slot."""
    room = Room(4, 16, rows=1, longest=64)
    sequence = Sequence(Request(0, prompt, Sampling(1)), 0, list(prompt))
    assert room.start(sequence, 0)
    cache = KVCache(model.shapes, 4, 16, model.dtype, model.device)
    batch = pack([Chunk(sequence, 0, len(prompt), True)], room.tables, cache, Router(1, model.device), model.device)
    batch.outputs = torch.arange(len(prompt))
    return model.forward(batch).clone()


def answer(model: Model, prompt: list[int]) -> tuple[Tensor, list[int]]:
    """What `peft_answer` gives, of our model."""
    tokens = list(prompt)
    for _ in range(TOKENS):
        last = logits(model, tokens)[-1]
        last[2] = float("-inf")  # min_new_tokens: the end-of-sequence token is out
        tokens.append(int(last.argmax()))
    return logits(model, prompt), tokens[len(prompt) :]
