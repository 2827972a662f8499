"""Drawing the next token of every row of a step.

The order is transformers': penalties and bias on the raw logits, temperature, top-k, top-p, min-p. A draw inverts the
cumulative distribution at one uniform number that depends on (seed, sample, position) alone, so a row's tokens do not
depend on what it is batched with, and a rerun repeats them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from loramill.worker.request import Sampling, TokenLogprob
from loramill.worker.sequence import Sequence

_CANDIDATES = 256
"""How many of the likeliest tokens top-k, top-p and min-p look at first; rows that need more sort the vocabulary."""
_BLOCK = 256
"""Block size of the two-level cumulative sum: no float64 copy of the vocabulary, no drift over 100,000 float32 sums."""


class Draw(NamedTuple):
    """The token drawn for a row; None when its logits were not finite."""

    token: int | None
    logprob: TokenLogprob | None


def draw(logits: Tensor, sequences: Many[Sequence]) -> list[Draw]:
    """Choose a token for each row of `logits` [rows, vocab]; `sequences` say how."""
    samplings = [s.request.sampling for s in sequences]
    logprobs = _logprob_rows(logits, samplings)
    if any(_adjusts(s) for s in samplings):
        logits = logits.float()  # a copy, unless the model computes in float32: then in place is as good
        for row, sequence in enumerate(sequences):
            if _adjusts(sequence.request.sampling):
                _adjust(logits[row], sequence)
    best, greedy = logits.max(dim=-1)
    finite, tokens = torch.isfinite(best).tolist(), greedy.tolist()
    sampled = [row for row, s in enumerate(samplings) if s.temperature > 0 and finite[row]]
    if sampled:
        chosen = logits if len(sampled) == len(samplings) else logits[torch.tensor(sampled, device=logits.device)]
        uniforms = [_uniform(samplings[r].seed, sequences[r].index, sequences[r].generated) for r in sampled]
        for row, token in zip(sampled, _sample(chosen, [samplings[r] for r in sampled], uniforms), strict=True):
            tokens[row] = token
    return [
        Draw(token, _report(logprobs.get(row), token, samplings[row])) if finite[row] else Draw(None, None)
        for row, token in enumerate(tokens)
    ]


def _adjusts(s: Sampling) -> bool:
    return bool(s.logit_bias) or s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


def _adjust(row: Tensor, sequence: Sequence) -> None:
    """Penalties and bias on one row [vocab], in place."""
    s = sequence.request.sampling
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        score = row[seen]
        row[seen] = torch.where(score > 0, score / s.repetition_penalty, score * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and sequence.generated:
        output = torch.tensor(sequence.tokens[len(sequence.request.prompt) :], device=row.device)
        used, counts = output.unique(return_counts=True)
        row[used] -= s.presence_penalty + s.frequency_penalty * counts.to(row.dtype)
    if s.logit_bias:
        row[torch.tensor(list(s.logit_bias), device=row.device)] += torch.tensor(
            list(s.logit_bias.values()), dtype=row.dtype, device=row.device
        )


def _uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) from a counter: 53 bits of a keyed hash."""
    digest = hashlib.blake2b(struct.pack("<QII", seed, sample, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _sample(logits: Tensor, samplings: Many[Sampling], uniforms: Many[float]) -> list[int]:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    scaled = logits.float() / column([s.temperature for s in samplings])
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    filtered = [row for row, s in enumerate(samplings) if s.top_k > 0 or s.top_p < 1 or s.min_p > 0]
    tokens = [-1] * len(samplings)
    if len(filtered) < len(samplings):
        plain = sorted(set(range(len(samplings))) - set(filtered))
        picked = _invert(torch.softmax(scaled[plain], dim=-1), points[plain]).tolist()
        for row, token in zip(plain, picked, strict=True):
            tokens[row] = token
    candidates = min(_CANDIDATES, scaled.shape[-1])
    while filtered:
        keep = [samplings[row] for row in filtered]
        drawn, enough = _filtered(scaled[filtered], keep, points[filtered], candidates)
        for row, token, done in zip(filtered, drawn.tolist(), enough.tolist(), strict=True):
            tokens[row] = token if done else -1
        filtered = [row for row in filtered if tokens[row] < 0]
        candidates = scaled.shape[-1]
    return tokens


def _filtered(scaled: Tensor, samplings: Many[Sampling], points: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Draw among the `candidates` likeliest tokens; and whether they were enough to know what the filters keep."""
    vocab = scaled.shape[-1]
    device = scaled.device
    top_k = torch.tensor([s.top_k or vocab for s in samplings], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)[:, None]
    min_p = torch.tensor([s.min_p for s in samplings], dtype=torch.float64, device=device)[:, None]
    best, ids = scaled.topk(candidates, dim=-1)
    weights = torch.exp((best - best[:, :1]).double())
    in_k = torch.arange(candidates, device=device) < top_k
    weights = weights.masked_fill(~in_k, 0)
    # Top-p's shares are of what top-k left; a top-k within the candidates makes their sum the whole.
    everything = torch.exp((scaled - best[:, :1]).double()).sum(dim=-1, keepdim=True)
    total = torch.where(top_k <= candidates, weights.sum(dim=-1, keepdim=True), everything)
    before = weights.cumsum(dim=-1) - weights
    kept = in_k & (before < top_p * total) & (weights >= min_p)
    kept[:, 0] = True
    enough = ~kept[:, -1] | (top_k[:, 0] <= candidates) | (candidates == vocab)
    cumulative = weights.masked_fill(~kept, 0).cumsum(dim=-1)
    place = torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True)
    last = kept.sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(place, last))[:, 0], enough


def _invert(probs: Tensor, points: Tensor) -> Tensor:
    """The first token at which the cumulative sum of `probs` [n, vocab] passes `points` [n] of its total."""
    n, vocab = probs.shape
    blocks = torch.nn.functional.pad(probs, (0, -vocab % _BLOCK)).view(n, -1, _BLOCK)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = points[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    inside = blocks.gather(1, block[:, :, None].expand(n, 1, _BLOCK))[:, 0].double().cumsum(dim=-1)
    start = ends.gather(1, block) - inside[:, -1:]
    place = torch.searchsorted(inside, (target - start).clamp_(min=0), right=True)
    # Rounding may put the target a hair past the block's end: then its last token with any weight is meant.
    last = (inside < inside[:, -1:]).sum(dim=-1, keepdim=True)
    return (block * _BLOCK + torch.minimum(place, last))[:, 0]


def _logprob_rows(logits: Tensor, samplings: Many[Sampling]) -> dict[int, Tensor]:
    """Log-probabilities under the raw distribution of the rows that report them: row -> [vocab]."""
    rows = [row for row, s in enumerate(samplings) if s.logprobs is not None]
    if not rows:
        return {}
    return dict(zip(rows, torch.log_softmax(logits[rows].float(), dim=-1), strict=True))


def _report(logprobs: Tensor | None, token: int, sampling: Sampling) -> TokenLogprob | None:
    if logprobs is None or sampling.logprobs is None:
        return None
    values, ids = logprobs.topk(sampling.logprobs)
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
