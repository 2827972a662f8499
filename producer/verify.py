"""`loramill adapters verify`: what an adapter changes in one answer, and whether PEFT computes the same."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import click

from loramill.producer.catalogue import chosen, open_registry
from loramill.schemas.errors import LineError
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.request import Endpoint, Row
from loramill.schemas.sampling import CompletionBody
from loramill.worker.adapters import AdapterError
from loramill.worker.base_files import silence_libraries
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.model import BaseInfo, ModelError
from loramill.worker.models import Opener
from loramill.worker.registry import Entry
from loramill.worker.request import plain

_AGREES_WITHIN = 1e-3
"""Of the largest logit. Measured on the shipped example: below 1e-6, and 0.2 or more without the adapter."""


@dataclass(slots=True, frozen=True)
class Verdict:
    """What came of one adapter, as it was trained (strength 1)."""

    name: str
    sha256: str | None = None
    largest_logit_change: float | None = None
    """Against the base, over its vocabulary, for the token after the prompt. None: not finite, or not computed."""
    greedy_changes: bool | None = None
    """Whether the likeliest token is another one."""
    peft_difference: float | None = None
    """The largest between PEFT's logits and ours; None where PEFT is not installed."""
    agrees: bool = False
    """It changes something (unless it need not), and PEFT, if it is there, computes the same."""
    problems: tuple[str, ...] = ()
    """Why it cannot be served with this base."""


def verify(names: tuple[str, ...], *, prompt: str, device: str, json: bool, **given: Any) -> ExitCode:
    """Carries out the command for `names`, or for every adapter. Raises Failure."""
    silence_libraries()
    registry, opener = open_registry(**given)
    assert opener is not None
    picked = chosen(registry, names)
    bench = _Bench(opener, prompt, device)
    code = ExitCode.OK
    for name in picked:
        entry = registry.adapters.get(name)
        verdict = bench.judge(name, entry) if entry else Verdict(name, problems=(registry.refused[name],))
        click.echo(_as_json(verdict) if json else _in_words(verdict))
        found = ExitCode.INPUT if verdict.problems else ExitCode.OK if verdict.agrees else ExitCode.ROWS_FAILED
        code = max(code, found)
    return code


class _Bench:
    """The base loaded in float32, and by PEFT too where that is installed."""

    def __init__(self, opener: Opener, prompt: str, device: str) -> None:
        base = opener.base
        self._opener = opener
        self._prompt = self._tokens(prompt)
        config = EngineConfig(
            base,
            dtype="float32",
            device=device,
            max_loras_per_batch=1,
            max_num_seqs=1,
            max_row_tokens=len(self._prompt) + 1,
        )
        try:
            self._engine = Engine(config)
        except ModelError as error:
            raise Failure(ExitCode.INPUT, str(error)) from error
        self._peft = _Peft(base, self._prompt, self._engine.device) if find_spec("peft") else None
        self._of_base = self._engine.next_logits(self._prompt)

    def judge(self, name: str, entry: Entry) -> Verdict:
        """Runs the prompt with the adapter."""
        try:
            adapter = self._opener.open(entry.spec).adapter
        except AdapterError as error:
            return Verdict(name, problems=tuple(error.problems))
        self._engine.register(adapter)
        merged = bool(adapter.static_only)
        ours = self._engine.next_logits(self._prompt, plain(adapter.sha256), merged=merged)
        self._engine.forget(adapter.sha256)
        # Tokens that training added come last: the base has nothing to hold them against.
        change = float((ours[: len(self._of_base)] - self._of_base).abs().max())
        theirs = self._peft.next_logits(adapter.path, adapter.vocab_size) if self._peft else None
        difference = None if theirs is None else float((ours - theirs).abs().max())
        effective = change > 0 or (change == 0 and self._opener.options.allow_noop_adapters)  # NaN is neither
        within = _AGREES_WITHIN * float(ours.abs().max())
        return Verdict(
            name,
            adapter.sha256,
            _finite(change),
            bool(ours.argmax() != self._of_base.argmax()),
            None if difference is None else _finite(difference),
            agrees=effective and (difference is None or difference <= within),
        )

    def _tokens(self, prompt: str) -> list[int]:
        prompter = self._opener.tokenizers.base
        row = Row("prompt", Endpoint.COMPLETIONS, "", prompt, CompletionBody(prompt=prompt))
        (tokens,) = prompter.encode_rows([row], [None])
        if isinstance(tokens, LineError) or len(tokens) >= prompter.limits.max_model_len:
            reason = tokens.message if isinstance(tokens, LineError) else "it is longer than the model's context"
            raise Failure(ExitCode.USAGE, f"--prompt: {reason}")
        return tokens


class _Peft:
    """The reference: transformers' own model with PEFT's adapter in it."""

    def __init__(self, base: BaseInfo, prompt: list[int], device: str) -> None:
        import torch

        self._torch = torch
        self._path, self._device = base.path, device
        self._prompt = torch.tensor([prompt], device=device)
        self._model = self._load()

    def next_logits(self, folder: str, vocab_size: int) -> Any:
        """[vocab] float32 of the token after the prompt; `vocab_size` is that of an adapter that added tokens."""
        from peft import PeftModel

        if vocab_size:  # a base of its own: what PEFT puts into a grown embedding stays there
            base = self._load()
            base.resize_token_embeddings(vocab_size, mean_resizing=False)
        else:
            base = self._model
        adapted = PeftModel.from_pretrained(base, folder).eval()
        try:
            with self._torch.inference_mode():
                return adapted(input_ids=self._prompt).logits[0, -1].float()
        finally:
            unloaded = adapted.unload()
            if not vocab_size:
                self._model = unloaded

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        # Eager attention: the only one of transformers' that honours Gemma 2's soft cap.
        return AutoModelForCausalLM.from_pretrained(
            self._path,
            dtype=self._torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        ).to(self._device)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_json(verdict: Verdict) -> str:
    return json.dumps(asdict(verdict))


def _in_words(verdict: Verdict) -> str:
    if verdict.problems:
        return "\n".join(f"{verdict.name}: {problem}" for problem in verdict.problems)
    change = "nothing finite" if verdict.largest_logit_change is None else f"{verdict.largest_logit_change:.3g}"
    token = "another" if verdict.greedy_changes else "the same"
    peft = "PEFT is not installed" if verdict.peft_difference is None else f"PEFT within {verdict.peft_difference:.2g}"
    return f"{verdict.name}: largest logit change {change}, {token} greedy token; {peft}" + (
        "" if verdict.agrees else ": DISAGREES"
    )
