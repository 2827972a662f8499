from __future__ import annotations

from dataclasses import fields
from typing import Any

import orjson
import pytest

from loramill.schemas.errors import LineError
from loramill.schemas.request import parse_line
from loramill.schemas.sampling import resolve_params
from loramill.worker.request import Sampling


def resolve(
    body: dict[str, Any],
    *,
    defaults: dict[str, float] | None = None,
    seed: int = 0,
    prompt_tokens: int = 10,
    custom_id: str = "r",
) -> Sampling:
    row = parse_line(orjson.dumps({"id": custom_id} | body))
    values = resolve_params(
        row.params, row.custom_id, defaults=defaults or {}, prompt_tokens=prompt_tokens, max_model_len=100, seed=seed
    )
    assert values.keys() == {field.name for field in fields(Sampling)}
    return Sampling(**values)


TEXT = {"prompt": "p"}
CHAT = {"messages": [{"role": "user", "content": "p"}]}


def test_openai_defaults() -> None:
    plain = resolve(TEXT)
    assert plain == Sampling(max_tokens=16, seed=plain.seed)
    assert resolve(CHAT).max_tokens == 90


def test_model_defaults_and_what_the_row_says() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    got = resolve(TEXT, defaults=defaults)
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.repetition_penalty) == (0.6, 0.9, 20, 0.1, 1.1)
    assert isinstance(got.top_k, int)
    row = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    assert resolve(TEXT | row, defaults=defaults) == resolve(TEXT | {"temperature": 0})


def test_every_field_arrives() -> None:
    body = {
        "max_completion_tokens": 5,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "logit_bias": {"7": 2, "0": -100},
        "n": 3,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "logprobs": 0,
        "seed": 12,
    }
    got = resolve(TEXT | body)
    assert got == Sampling(
        max_tokens=5,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        logit_bias={7: 2.0, 0: -100.0},
        n=3,
        stop=("a", "b"),
        stop_token_ids=(4,),
        ignore_eos=True,
        logprobs=0,
        seed=12,
    )


def test_chat_logprobs() -> None:
    assert resolve(CHAT | {"logprobs": False}).logprobs is None
    assert resolve(CHAT | {"logprobs": True}).logprobs == 0
    assert resolve(CHAT | {"logprobs": True, "top_logprobs": 4}).logprobs == 4


def test_seed() -> None:
    assert resolve(TEXT | {"seed": -1}).seed == 2**64 - 1
    assert resolve(TEXT | {"seed": 5}, seed=1) == resolve(TEXT | {"seed": 5}, seed=2, custom_id="other")
    # Pinned: the seed of a row without one is part of what makes a rerun give the same tokens.
    assert resolve(TEXT).seed == 738308632745826255
    seeds = {resolve(TEXT, seed=seed, custom_id=name).seed for seed in (0, 1) for name in ("a", "b")}
    assert len(seeds) == 4


def test_default_length_is_cut_to_the_context_and_a_wish_is_not() -> None:
    assert resolve(TEXT, prompt_tokens=95).max_tokens == 5
    assert resolve(TEXT | {"max_tokens": 5}, prompt_tokens=95).max_tokens == 5
    for body, tokens, param in [
        (TEXT | {"max_tokens": 6}, 95, "max_tokens"),
        (CHAT | {"max_completion_tokens": 91}, 10, "max_completion_tokens"),
        (TEXT, 100, "prompt"),
        (CHAT, 101, "messages"),
    ]:
        with pytest.raises(LineError, match="context") as caught:
            resolve(body, prompt_tokens=tokens)
        assert (caught.value.code, caught.value.param) == ("token_limit_exceeded", param)
