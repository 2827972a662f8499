"""The named points of `python -m bench`: what is run, by whom, and why. A dozen, not a grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.job import Spec

MAIN = Spec()
SMALL = Spec(
    layers=6, hidden=512, intermediate=1408, heads=8, kv_heads=4, vocab=8192, prompt_tokens=64, output_tokens=32
)
"""A Qwen2 shape of 21.9M parameters, for points of which many are wanted."""
TINY = Spec(tiny=True, adapters=8, prompt_tokens=24, least_prompt_tokens=8, output_tokens=8, vocab=262)

NO_LORA = ("transformers", "transformers-continuous", "vllm", "loramill-base")
LORA = ("loramill-8", "loramill-16", "loramill-static", "loramill-auto")
PEFT = ("peft-mixed", "peft-grouped")
VLLM = ("vllm-4", "vllm-8", "vllm-16")
FEW = ("loramill-base", "loramill", "loramill-auto", *PEFT, "vllm", "vllm-8")
"""Of a point beside the main one."""
EVICTING = ("loramill-8", *FEW)
"""Of one that has more than eight adapters."""


@dataclass(frozen=True, slots=True)
class NamedPoint:
    """One job and who answers it."""

    about: str
    spec: Spec
    runners: tuple[str, ...]
    quick: bool = False
    """Whether `make bench` has it."""


POINTS = {
    "main": NamedPoint("the job that the targets are about", MAIN, (*NO_LORA, *LORA, *PEFT, *VLLM), quick=True),
    "adapters-1": NamedPoint("one adapter", replace(SMALL, rows=256, adapters=1), FEW),
    "adapters-8": NamedPoint("8 adapters", replace(SMALL, rows=256, adapters=8), FEW),
    "adapters-64": NamedPoint("64 adapters", replace(SMALL, rows=256, adapters=64), EVICTING, quick=True),
    "adapters-512": NamedPoint(
        "512 adapters",
        replace(SMALL, rows=2048, adapters=512),
        ("loramill-8", "loramill-base", "loramill", "loramill-auto"),
    ),
    "ranks-mixed": NamedPoint("ranks 8 to 64", replace(SMALL, rows=256, rank=64, least_rank=8), EVICTING, quick=True),
    "prompts-short": NamedPoint(
        "prompts of 16 tokens", replace(SMALL, rows=256, prompt_tokens=16, output_tokens=64), FEW
    ),
    "prompts-long": NamedPoint(
        "prompts of 1,024 tokens", replace(SMALL, rows=64, prompt_tokens=1024, output_tokens=16), FEW
    ),
    "outputs-varied": NamedPoint(
        "answers of 4 to 128 tokens",
        replace(SMALL, rows=256, output_tokens=128, least_output_tokens=4),
        EVICTING,
        quick=True,
    ),
    "shared-prompt": NamedPoint(
        "a system prompt of 300 tokens for each adapter",
        replace(MAIN, rows=1000, adapters=8, prompt_tokens=332, shared_tokens=300, output_tokens=8),
        ("loramill", "loramill-unshared", "vllm-8"),
    ),
    "auto-2000": NamedPoint(
        "2,000 rows in auto mode",
        replace(MAIN, rows=2000, adapters=8, prompt_tokens=64, output_tokens=32),
        ("loramill-base", "loramill-auto"),
    ),
    "growth-1000": NamedPoint("1,000 rows of the tiny model", replace(TINY, rows=1000), ("loramill",), quick=True),
    "growth-10000": NamedPoint("10,000 rows of it", replace(TINY, rows=10_000), ("loramill",), quick=True),
    "growth-100000": NamedPoint("100,000 rows of it", replace(TINY, rows=100_000), ("loramill",)),
}
