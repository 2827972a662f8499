"""Rows of mixed adapters, as the engine takes them and as PEFT answers them."""

from __future__ import annotations

import random
import warnings
from typing import Any

import peft
import torch
import transformers

from loramill.worker.request import Request, Sampling, plain

TOKENS = 20


def mixed_rows(seed: int, count: int = 24) -> list[tuple[list[int], int | None]]:
    """(prompt, adapter number or None for the base), shuffled."""
    draw = random.Random(seed)
    return [
        ([draw.randrange(3, 97) for _ in range(draw.choice([1, 2, 7, 30, 59]))], draw.choice([None, 0, 1, 2, 3, 4]))
        for _ in range(count)
    ]


def requests_of(one: Any, rows: list[tuple[list[int], int | None]], tokens: int = TOKENS) -> list[Request]:
    """The rows as the engine takes them, greedy."""
    return [
        Request(key, prompt, Sampling(tokens, temperature=0), () if a is None else plain(one.adapters[a].sha256))
        for key, (prompt, a) in enumerate(rows)
    ]


def peft_model(one: Any, device: str = "cpu") -> Any:
    """The family in PEFT, its adapters named "0", "1", ..."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Eager attention: the only one of transformers' that honours Gemma 2's soft cap.
        base = transformers.AutoModelForCausalLM.from_pretrained(one.folder, attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(base, one.adapter_folders[0], adapter_name="0")
        for number, folder in enumerate(one.adapter_folders[1:], 1):
            model.load_adapter(folder, str(number))
        return model.to(device, torch.float32).eval()


def generate(model: Any, prompt: list[int]) -> list[int]:
    """What it says greedily after the prompt."""
    device = model.device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(
            input_ids=torch.tensor([prompt], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
            max_new_tokens=TOKENS,
            do_sample=False,
        )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


def peft_answers(one: Any, rows: list[tuple[list[int], int | None]], device: str = "cpu") -> list[list[int]]:
    """What PEFT generates for each (prompt, adapter number or None for the base), row by row."""
    model = peft_model(one, device)
    answers = []
    for prompt, adapter in rows:
        if adapter is None:
            with model.disable_adapter():
                answers.append(generate(model, prompt))
        else:
            model.set_adapter(str(adapter))
            answers.append(generate(model, prompt))
    return answers
