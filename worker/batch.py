"""The packed batch of one forward pass, and how the model's layers find it while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loramill.kernels.multi_lora import Routing
from loramill.kernels.router import Router
from loramill.kernels.routing import TileRouting
from loramill.worker.cache import KVCache, LayerShape, Places
from loramill.worker.sequence import Chunk
from loramill.worker.slabs import Room, Slabs

_WHOLE_ROOM = 0.4
"""From which share of a room on decoding computes all of it: the products copy an operand that is cut short (128 rows
in rooms of 224, 4 KV heads of 64, two cores: 1.47 ms a layer for all; for half, 0.4 and 0.3 of it 1.78, 1.48, 1.07)."""


@dataclass(slots=True)
class Prefill:
    """Chunks of `count` tokens each with `past` tokens in the cache before them.

    Fresh prompts of one length attend together: `rows` [n * count] are their batch rows. A chunk with a past stands
    alone, its cache in `room`.
    """

    count: int
    past: int
    rows: Tensor
    room: Room
    _biases: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, group: int) -> Tensor:
        """What scores are raised by: 0 or -inf, [group * count, past + count] float32 for the heads of a KV group."""
        length = self.past + self.count
        if window is not None and window >= length:
            window = None
        if (window, group) not in self._biases:
            may = seen(self.count, length, window, self.rows.device)
            bias = torch.zeros(may.shape, device=may.device).masked_fill_(~may, float("-inf"))
            self._biases[window, group] = bias.repeat(group, 1)
        return self._biases[window, group]


@dataclass(slots=True)
class Decode:
    """Every row of one slab, of which `queries` name the batch row [n]; a row not decoding now repeats another's."""

    room: Room
    """The slab's first row."""
    span: int
    """Positions that are computed for every row: up to the longest, or the whole room."""
    queries: Tensor
    lengths: Tensor
    """Tokens of each row to attend to, the new one included: [n]."""
    answered: Tensor | None
    """Which of the slab's rows decode, when not all do."""
    _biases: dict[int | None, Tensor] = field(default_factory=dict)

    def bias(self, window: int | None) -> Tensor:
        """What scores are raised by: 0 where a row may attend, -inf elsewhere; [n, 1, 1, span] float32."""
        if window is not None and window >= self.span:
            window = None
        if window not in self._biases:
            position = torch.arange(self.span, device=self.lengths.device)
            end = self.lengths[:, None]
            hidden = position >= end if window is None else (position >= end) | (position < end - window)
            zeros = torch.zeros(hidden.shape, device=hidden.device)
            self._biases[window] = zeros.masked_fill_(hidden, float("-inf"))[:, None, None, :]
        return self._biases[window]


@dataclass(slots=True)
class Batch:
    """T packed tokens, sorted by adapter slot, and the cache that they read and write."""

    cache: KVCache
    tokens: Tensor
    positions: Tensor
    places: Places
    """Where in the cache each token goes."""
    outputs: Tensor
    """The rows whose logits are wanted: [O]."""
    routing: Routing | TileRouting
    output_routing: Routing | TileRouting
    """The same for a projection that sees the output rows only (the head)."""
    prefills: list[Prefill]
    decodes: list[Decode]
    decode_rows: Tensor
    """The batch row that each answered query of `decodes`, in order, belongs to."""
    _index: dict[LayerShape, Tensor] = field(default_factory=dict)

    def write(self, layer: int, shape: LayerShape, key: Tensor, value: Tensor) -> None:
        """Put the tokens' key and value [T, heads, dim] of a layer into the cache."""
        if shape not in self._index:
            self._index[shape] = self.cache.index(layer, self.places)
        self.cache.write(layer, self._index[shape], key, value)


@dataclass(slots=True)
class Probe:
    """Stands in for a batch in one tiny pass that learns each layer's shape (and whether we can serve it)."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)


def pack(chunks: Sequence[Chunk], slabs: Slabs, cache: KVCache, router: Router, device: torch.device) -> Batch:
    """Lay out the chunks of a step, in their order."""
    tokens: list[int] = []
    positions: list[int] = []
    offsets: list[int] = []
    capacities: list[int] = []
    outputs: list[int] = []
    fresh: dict[int, list[int]] = {}
    continued: list[tuple[int, int, int, Room]] = []
    decoding: dict[int, dict[int, int]] = {}  # slab -> row in it -> batch row
    for sequence, start, count, samples in chunks:
        place = sequence.place
        assert place is not None, "a scheduled sequence has a place"
        first, room = len(tokens), slabs.room(place)
        tokens += sequence.tokens[start : start + count]
        positions += range(start, start + count)
        offsets += [room.offset] * count
        capacities += [room.capacity] * count
        place.length = start + count
        if samples:
            outputs.append(len(tokens) - 1)
        if count == 1:
            decoding.setdefault(place.slab, {})[place.row] = first
        elif start == 0:
            fresh.setdefault(count, []).extend(range(first, first + count))
        else:
            continued.append((first, count, start, room))

    def on_device(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    prefills = [Prefill(count, 0, on_device(rows), Room(0, 0)) for count, rows in fresh.items()]
    prefills += [Prefill(n, past, on_device(range(first, first + n)), room) for first, n, past, room in continued]
    decodes = [_decode(slabs, slab, rows, device) for slab, rows in decoding.items()]
    where = on_device(positions)
    return Batch(
        cache=cache,
        tokens=on_device(tokens),
        positions=where,
        places=Places(on_device(offsets), on_device(capacities), where),
        outputs=on_device(outputs),
        routing=router.route((c.sequence.slots, c.size) for c in chunks),
        output_routing=router.route((c.sequence.slots, int(c.samples)) for c in chunks),
        prefills=prefills,
        decodes=decodes,
        decode_rows=on_device([rows[row] for rows in decoding.values() for row in sorted(rows)]),
    )


def _decode(slabs: Slabs, slab: int, rows: dict[int, int], device: torch.device) -> Decode:
    held = slabs.rows(slab)[: max(rows) + 1]
    some_row = next(iter(rows.values()))
    # A row between two chunks of its prompt is computed with the others and thrown away: cheaper than a copy.
    lengths = [place.length if place.row in rows else 1 for place in held]
    queries = [rows.get(place.row, some_row) for place in held]
    longest, room = max(lengths), slabs.room(held[0])
    return Decode(
        room=room,
        span=room.capacity if longest > room.capacity * _WHOLE_ROOM else longest,
        queries=torch.tensor(queries, device=device),
        lengths=torch.tensor(lengths, device=device),
        answered=None if len(rows) == len(held) else torch.tensor(sorted(rows), device=device),
    )


def seen(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `length` positions each of the last `count` may attend to: causal, [count, length] bool."""
    key = torch.arange(length, device=device)
    query = torch.arange(length - count, length, device=device)[:, None]
    within = key <= query
    return within if window is None else within & (key > query - window)


_current: ContextVar[Batch | Probe] = ContextVar("loramill_batch")


@contextmanager
def running(batch: Batch | Probe) -> Iterator[None]:
    """Within this block `current()` is `batch`: not every model hands arguments of ours down to its layers."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Batch | Probe:
    """What `running` was given."""
    return _current.get()
