"""Passes between their launch and the moment at which their tokens are known."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass

from torch import Tensor

from loramill.kernels.router import Router
from loramill.worker.batch import Drawn, pack
from loramill.worker.cache import KVCache
from loramill.worker.model import Model
from loramill.worker.room import Room
from loramill.worker.sampling import Draw, Drawing, looks_back
from loramill.worker.sequence import Chunk, Sequence


@dataclass(slots=True)
class Flight:
    """What was launched, and the rows that get a token, each with its epoch then."""

    chunks: Several[Chunk]
    rows: list[tuple[Sequence, int]]
    drawing: Drawing | None
    began_s: float
    """By time.perf_counter."""

    @classmethod
    def launched(cls, chunks: Several[Chunk], logits: Tensor, began_s: float) -> Flight:
        """The pass of these chunks, which gave `logits` [O, vocab]: its tokens are about to be drawn, and its rows have
        gone on."""
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        drawing = Drawing(logits, sampled) if sampled else None
        for chunk in chunks:
            chunk.sequence.computed += chunk.size
        for sequence in sampled:
            sequence.ahead += 1
        return cls(chunks, [(sequence, sequence.epoch) for sequence in sampled], drawing, began_s)

    @property
    def can_be_followed(self) -> bool:
        """Whether the next pass can be launched before the tokens of this one are known."""
        return not any(looks_back(sequence.request.sampling) for sequence, _ in self.rows)

    @property
    def drawn(self) -> Drawn | None:
        """What the next pass goes on from."""
        if self.drawing is None:
            return None
        return Drawn(self.drawing.tokens, {sequence: place for place, (sequence, _) in enumerate(self.rows)})

    def settle(self) -> list[tuple[Sequence, Draw]]:
        """Wait for the tokens: those of the rows that still want them."""
        draws = self.drawing.wait() if self.drawing is not None else []
        wanted = [(row, draw) for (row, epoch), draw in zip(self.rows, draws, strict=True) if row.epoch == epoch]
        for row, draw in wanted:
            row.ahead -= 1
            if draw.redrawn and row.ahead:  # the next pass has gone on from another token
                row.computed -= 1
                row.forget_ahead()
        return wanted


class Flights:
    """The passes under way over one cache."""

    def __init__(self, model: Model, cache: KVCache, router: Router, room: Room, *, overlap: bool) -> None:
        self.overlap = overlap
        """Whether a pass may be launched before the tokens of the one before it are known."""
        self._model, self._cache, self._router, self._room = model, cache, router, room
        self._under_way: deque[Flight] = deque()
        self._settled_s = 0.0

    @property
    def can_be_followed(self) -> bool:
        """Whether the next pass can be launched now."""
        return not self._under_way or (self.overlap and self._under_way[-1].can_be_followed)

    def launch(self, chunks: Several[Chunk]) -> Tensor:
        """A pass of these, after those under way: the logits [O, vocab] of the rows that get a token."""
        began_s = time.perf_counter()
        drawn = self._under_way[-1].drawn if self._under_way else None
        batch = pack(chunks, self._room.tables, self._cache, self._router, self._model.device, drawn)
        logits = self._model.forward(batch)
        self._under_way.append(Flight.launched(chunks, logits, began_s))
        return logits

    def settle(self, left: int = 0) -> Iterator[tuple[Flight, float, list[tuple[Sequence, Draw]]]]:
        """Wait for passes, the first first, until so many are under way: each with its seconds, and what its rows got.

        Of passes that overlap the seconds are those from one to the next."""
        while len(self._under_way) > left:
            flight = self._under_way.popleft()
            drawn = flight.settle()
            began_s, self._settled_s = max(flight.began_s, self._settled_s), time.perf_counter()
            yield flight, self._settled_s - began_s, drawn

    def abandon(self) -> None:
        """Whatever is under way is for nobody: all rows start over."""
        self._under_way.clear()
