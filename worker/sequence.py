"""An answer in the making, and what a pass computes of several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from loramill.kernels.mixes import Mix as SlotMix
from loramill.worker.request import Mix, Request, TokenLogprob
from loramill.worker.slots import Load


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: sample `index` of `request`."""

    request: Request
    index: int
    tokens: list[int]
    """Prompt and what was generated so far."""
    computed: int = 0
    """How many of `tokens` have their keys and values in the cache."""
    slots: SlotMix = ()
    """The slots of its mix while it runs, none if the mix is merged."""
    pages: list[int] = field(default_factory=list)
    """Of the cache, while it runs: room for all of `tokens`."""
    line: int = -1
    """Of the table that holds them as well."""
    shared: int = 0
    """How many of `tokens` it found computed when it started."""
    started: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ahead: int = 0
    """Tokens that passes under way draw for it: the next pass can compute them, what they are is not known yet."""
    epoch: int = 0
    """Goes up when what passes under way draw for it is void."""

    @property
    def generated(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def length(self) -> int:
        """Tokens, with those that are not known yet."""
        return len(self.tokens) + self.ahead

    @property
    def pending(self) -> int:
        return self.length - self.computed

    @property
    def ends(self) -> bool:
        """Whether it is only to be learnt what its last token is: there is nothing more to compute."""
        return self.ahead > 0 and self.length >= len(self.request.prompt) + self.request.sampling.max_tokens

    def forget_ahead(self) -> None:
        """Whatever passes under way draw for it, it has the tokens that are known."""
        self.ahead = 0
        self.epoch += 1

    @property
    def weights(self) -> Mix:
        """The mix that must be merged into the base's weights while this runs."""
        return self.request.mix if self.request.merged else ()

    @property
    def computed_with(self) -> tuple[Mix, bool]:
        """What keys and values depend on beside the tokens: merged, they are rounded otherwise."""
        return self.request.mix, self.request.merged

    @property
    def amid_prompt(self) -> bool:
        """Whether nothing was drawn yet that would have shown a NaN in what the cache has of it."""
        return self.computed < len(self.request.prompt)

    def asks_for(self, adapter: str) -> bool:
        """Whether the adapter is in its mix."""
        return any(adapter == member for member, _ in self.request.mix)

    def chunk(self, budget: int) -> Chunk:
        """What of it is computed next, of at most so many tokens."""
        pending = self.pending
        size = min(pending, budget)
        return Chunk(self, self.computed, size, size == pending)

    @property
    def longest(self) -> int:
        """Tokens that the cache may have to hold (the last token is never computed)."""
        return len(self.request.prompt) + self.request.sampling.max_tokens - 1


class Chunk(NamedTuple):
    """`size` tokens of a sequence from position `start`; `samples`: it reaches the end, so a token is drawn."""

    sequence: Sequence
    start: int
    size: int
    samples: bool

    @property
    def begins(self) -> bool:
        """Whether it is the first since the sequence started."""
        return self.start == self.sequence.shared


class Step(NamedTuple):
    """One forward pass: see that `weights` is what is merged into the base, carry out `loads`, then compute `chunks`,
    which are sorted by mix."""

    weights: Mix
    loads: list[Load]
    chunks: list[Chunk]
