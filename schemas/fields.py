"""Body fields that are not modelled: inert ones are dropped, ones that would change the answer are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import LineError, did_you_mean, invalid

INERT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",  # says how tools are called; tools themselves are refused
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Accepted, without any effect on the answer here as elsewhere."""

# Every field here changes the answer in some server that people write batch files for. The values are the ones that
# ask for nothing (null always does), so files written by tools that spell out every default still run.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "mm_processor_kwargs": ({},),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream": (False,),
    "stream_options": (),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Field -> the values beside null that ask for nothing and are accepted."""


def without_unmodelled(body: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """`body` with only `known` fields. A field that we do not honour raises LineError, by name."""
    extra = body.keys() - known
    if not extra:
        return body
    for name in sorted(extra):
        value = body[name]
        if name in INERT:
            continue
        if name == "best_of":
            _check_best_of(value, body.get("n"))
        elif name not in UNSUPPORTED:
            raise unknown_field(name, known | INERT)
        elif value is not None and not _asks_nothing(value, UNSUPPORTED[name]):
            raise invalid(f"`{name}` is not supported", name)
    return {name: value for name, value in body.items() if name not in extra}


def unknown_field(name: str, known: frozenset[str], path: str = "") -> LineError:
    """The error for a field that nobody knows, with the nearest name that somebody does."""
    shown = path + (name if len(name) <= 64 else name[:61] + "...")
    return invalid(f"unknown field `{shown}`{did_you_mean(shown, known)}", shown)


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    # `1 == True` in Python, and `"stream": 0` is a wrong type, not a neutral value; 1 and 1.0 are one number in JSON.
    return any(value == want and isinstance(value, bool) == isinstance(want, bool) for want in neutral)


def _check_best_of(value: Any, n: Any) -> None:
    # Drawing exactly as many answers as are returned is what `n` alone does.
    if value is not None and (isinstance(value, bool) or value != (1 if n is None else n)):
        raise invalid("`best_of` is not supported (other than equal to `n`)", "best_of")
