"""Rows that must come to the same answer, so that one of them is computed for all."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import fields
from hashlib import blake2b
from operator import attrgetter

from loramill.schemas.prompt import Prompter
from loramill.worker.request import Request, Result, Sampling

KEPT_TOKENS = 2**18
"""Of answers that are kept for rows to come: some 10 MB."""
ROW_TOKENS = 32
"""A row without its tokens takes about a kilobyte, as much as so many of them."""

Identity = tuple[Hashable, ...]

_SAMPLING = attrgetter(*(one.name for one in fields(Sampling) if one.name not in ("seed", "logit_bias")))


def identity_of(request: Request, prompter: Prompter, *, seeded: bool) -> Identity | None:
    """What decides the row's answer; None if it is sampled with a seed that is its own (not `seeded`)."""
    sampling = request.sampling
    if sampling.temperature and not seeded:
        return None
    prompt = blake2b(array("q", request.prompt).tobytes(), digest_size=16).digest()
    seed = sampling.seed if sampling.temperature else None
    bias = tuple(sorted(sampling.logit_bias.items()))
    return prompt, request.mix, request.merged, prompter, seed, bias, _SAMPLING(sampling)


class Kept:
    """Answers that rows to come may share: the latest, up to KEPT_TOKENS."""

    def __init__(self) -> None:
        self._results: dict[Identity, Result] = {}
        self._tokens = 0

    def get(self, identity: Identity) -> Result | None:
        """The answer to rows of this identity, if it is kept."""
        return self._results.get(identity)

    def put(self, identity: Identity, result: Result) -> None:
        """Keeps an answer, and lets the oldest go for it."""
        self._results[identity] = result
        self._tokens += _tokens(result)
        while self._tokens > KEPT_TOKENS:
            self._tokens -= _tokens(self._results.pop(next(iter(self._results))))


def _tokens(result: Result) -> int:
    """With the alternatives that were reported, and what the row takes itself."""
    alternatives = sum(len(token.top) for completion in result.completions for token in completion.logprobs or ())
    return ROW_TOKENS + sum(len(completion.token_ids) for completion in result.completions) + alternatives
