"""Drawing the next token of every row of a step, with one look at what the device has computed.

The order is transformers': penalties and bias on the raw logits, temperature, top-k, top-p, min-p. A draw inverts the
cumulative distribution at one uniform number that depends on (seed, sample, position) alone, so a row's tokens do not
depend on what it is batched with, and a rerun repeats them.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence as Many
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loramill.kernels.layer import largest
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
    redrawn: bool = False
    """Whether it is another than `Drawing.tokens` said."""


class Drawing:
    """A token for each row of `logits` [rows, vocab], drawn where they are; only `wait` waits for it.

    The logits may be written over once this is made.
    """

    def __init__(self, logits: Tensor, sequences: Many[Sequence]) -> None:
        """`sequences` say how."""
        samplings = self._samplings = [s.request.sampling for s in sequences]
        self._reported = [row for row, s in enumerate(samplings) if s.logprobs is not None]
        self._raw = torch.log_softmax(_some(logits, self._reported).float(), dim=-1) if self._reported else None
        if any(_adjusts(s) for s in samplings):
            logits = logits.float()  # a copy, unless the model computes in float32: then in place is as good
            for row, sequence in enumerate(sequences):
                if _adjusts(sequence.request.sampling):
                    _adjust(logits[row], sequence)
        best, self.tokens = largest(logits)
        """int64 [rows], where the logits are."""
        enough = torch.ones_like(self.tokens)
        sampled = [row for row, s in enumerate(samplings) if s.temperature > 0]
        self._sampler: _Sampler | None = None
        if sampled:
            rows = _on_device(sampled, logits)
            self._sampler = _Sampler(_some(logits, sampled), sampled, [sequences[row] for row in sampled])
            self.tokens[rows], enough[rows] = self._sampler.tokens, self._sampler.enough
        # Of a row that is not finite anything may have been drawn, and a pass may go on from it before that is known.
        self.tokens.clamp_(0, logits.shape[-1] - 1)
        self._numbers = _Coming(torch.stack([self.tokens, torch.isfinite(best).long(), enough]))
        self._report = (
            None if self._raw is None else _Coming(self._logprobs(self._raw, _some(self.tokens, self._reported)))
        )

    def wait(self) -> list[Draw]:
        """The tokens, once they are there."""
        tokens, finite, enough = self._numbers.wait()
        short = [row for row, known in enumerate(enough) if finite[row] and not known]
        report = self._said(self._reported, tokens, self._report.wait() if self._report is not None else [])
        if short and self._sampler is not None:
            for row, token in zip(short, self._sampler.from_all(short), strict=True):
                tokens[row] = token
            if self._raw is not None and (again := [row for row in short if row in report]):
                places = [self._reported.index(row) for row in again]
                drawn = _on_device([tokens[row] for row in again], self._raw)
                numbers = self._logprobs(self._raw[_on_device(places, self._raw)], drawn)
                report |= self._said(again, tokens, numbers.tolist())
        return [
            Draw(token, report.get(row), row in short) if finite[row] else Draw(None, None)
            for row, token in enumerate(tokens)
        ]

    def _logprobs(self, raw: Tensor, tokens: Tensor) -> Tensor:
        """Of the tokens drawn for some rows, then of the best ones, then those: [rows, 1 + 2 most] float64. `raw`
        [rows, vocab] is under the model's own distribution."""
        values, ids = raw.topk(max(self._samplings[row].logprobs or 0 for row in self._reported))
        return torch.cat([raw.gather(1, tokens[:, None]).double(), values.double(), ids.double()], 1)

    def _said(self, rows: Many[int], tokens: Many[int], numbers: Many[Many[float]]) -> dict[int, TokenLogprob]:
        report = {}
        for row, (logprob, *top) in zip(rows, numbers, strict=True):
            most = len(top) // 2
            best = list(zip(map(int, top[most:]), top[:most], strict=True))
            report[row] = TokenLogprob(tokens[row], logprob, best[: self._samplings[row].logprobs])
        return report


def draw(logits: Tensor, sequences: Many[Sequence]) -> list[Draw]:
    """Choose a token for each row of `logits` [rows, vocab]; `sequences` say how."""
    return Drawing(logits, sequences).wait()


def looks_back(sampling: Sampling) -> bool:
    """Whether what is drawn depends on the answer's tokens so far by more than their logits."""
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


class _Coming:
    """Numbers on their way to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._event = torch.cuda.Event() if numbers.is_cuda else None
        self._numbers = numbers.to("cpu", non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> Any:
        """As nested lists."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


def _on_device(numbers: Many[float], like: Tensor) -> Tensor:
    """Numbers where `like` is, int64 or float64; nobody waits until they are there."""
    dtype = torch.float64 if any(isinstance(number, float) for number in numbers) else torch.int64
    return torch.tensor(numbers, dtype=dtype).to(like.device, non_blocking=True)


def _some(x: Tensor, rows: Many[int]) -> Tensor:
    """These rows of x, in growing order; x itself where they are all."""
    return x if len(rows) == len(x) else x[_on_device(rows, x)]


def _adjusts(s: Sampling) -> bool:
    return bool(s.logit_bias) or looks_back(s)


def _adjust(row: Tensor, sequence: Sequence) -> None:
    """Penalties and bias on one row [vocab], in place."""
    s = sequence.request.sampling
    if s.repetition_penalty != 1:
        seen = _on_device(sorted(set(sequence.tokens)), row)
        score = row[seen]
        row[seen] = torch.where(score > 0, score / s.repetition_penalty, score * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and sequence.generated:
        counted = Counter(sequence.tokens[len(sequence.request.prompt) :])
        counts = _on_device(list(counted.values()), row).to(row.dtype)
        row[_on_device(list(counted), row)] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        row[_on_device(list(s.logit_bias), row)] += _on_device(list(s.logit_bias.values()), row).to(row.dtype)


def _uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) from a counter: 53 bits of a keyed hash."""
    digest = hashlib.blake2b(struct.pack("<QII", seed, sample, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class _Sampler:
    """Tokens for rows with a temperature: `tokens` [n], and `enough` [n], 1 where some of the likeliest were enough."""

    def __init__(self, logits: Tensor, rows: Many[int], sequences: Many[Sequence]) -> None:
        """`logits` [n, vocab] of these rows of a pass."""
        samplings = [s.request.sampling for s in sequences]
        uniforms = [_uniform(s.request.sampling.seed, s.index, s.generated + s.ahead) for s in sequences]
        columns = [[s.temperature, u, s.top_k, s.top_p, s.min_p] for s, u in zip(samplings, uniforms, strict=True)]
        how = torch.tensor(columns, dtype=torch.float64).to(logits.device, non_blocking=True)
        scaled = logits.float() / how[:, :1].float()
        filtered = [at for at, s in enumerate(samplings) if s.top_k > 0 or s.top_p < 1 or s.min_p > 0]
        plain = sorted(set(range(len(samplings))) - set(filtered))
        self.tokens = torch.zeros(len(samplings), dtype=torch.int64, device=logits.device)
        self.enough = torch.ones_like(self.tokens)
        if plain:
            at = _on_device(plain, logits)
            self.tokens[at] = _invert(torch.softmax(_some(scaled, plain), dim=-1), how[at, 1])
        if filtered:
            at = _on_device(filtered, logits)
            self._places = {rows[place]: number for number, place in enumerate(filtered)}
            self._scaled, self._how = _some(scaled, filtered), how[at]
            few = min(_CANDIDATES, scaled.shape[-1])
            self.tokens[at], self.enough[at] = _filtered(self._scaled, self._how, few)

    def from_all(self, rows: Many[int]) -> list[int]:
        """Tokens for rows for which the likeliest were not enough."""
        at = _on_device([self._places[row] for row in rows], self._scaled)
        tokens: list[int] = _filtered(self._scaled[at], self._how[at], self._scaled.shape[-1])[0].tolist()
        return tokens


def _filtered(scaled: Tensor, how: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Draw among the `candidates` likeliest tokens; and whether they were enough to know what the filters keep."""
    vocab = scaled.shape[-1]
    device = scaled.device
    _, points, top_k, top_p, min_p = how.split(1, dim=1)
    top_k = torch.where(top_k > 0, top_k, vocab)
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
    place = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    last = kept.sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(place, last))[:, 0], enough.long()


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
