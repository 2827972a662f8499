"""The packed batch of one forward pass, and how the model's layers find it while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramill.kernels.attention import Pages
from loramill.kernels.multi_lora import Routing
from loramill.kernels.router import Router
from loramill.kernels.routing import TileRouting
from loramill.worker.cache import KVCache, LayerShape
from loramill.worker.sequence import Chunk
from loramill.worker.sequence import Sequence as RowSequence


@dataclass(slots=True)
class Batch:
    """T packed tokens, sorted by adapter slot, and the cache that they read and write."""

    cache: KVCache
    tokens: Tensor
    positions: Tensor
    lines: Tensor
    """Where in the cache each token's key and value go, page * page_size + place: [T] int64."""
    pages: Pages
    outputs: Tensor
    """The rows whose logits are wanted: [O]."""
    routing: Routing | TileRouting
    output_routing: Routing | TileRouting
    """The same for a projection that sees the output rows only (the head)."""

    def at_outputs(self) -> Batch:
        """What projections are to find that all see the output rows only."""
        return replace(self, routing=self.output_routing)


class Asked(NamedTuple):
    """What a layer asks of its attention."""

    scale: float
    window: int | None
    softcap: float | None


@dataclass(slots=True)
class Probe:
    """Stands in for a batch in one tiny pass that learns what each layer is (and whether we can serve it)."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)


class Drawn(NamedTuple):
    """The tokens that a pass under way draws."""

    tokens: Tensor
    """int64, where the model is."""
    places: Mapping[RowSequence, int]
    """Where in `tokens` a row's is."""


def pack(
    chunks: Sequence[Chunk],
    tables: NDArray[np.int32],
    cache: KVCache,
    router: Router,
    device: torch.device,
    drawn: Drawn | None = None,
) -> Batch:
    """Lay out the chunks of a step, in their order; `tables` are the pages of running rows, a line each. A token that
    is not known yet is the row's in `drawn`."""
    # Python goes over rows, never over tokens: 256 decoding rows take 0.3 ms beside their routing.
    known = [c.sequence.tokens[c.start : c.start + c.size] for c in chunks]
    unknown = [number for number, (c, its) in enumerate(zip(chunks, known, strict=True)) if len(its) < c.size]
    for number in unknown:
        known[number] = [*known[number], 0]
    tokens = np.array([token for its in known for token in its], np.int64)
    starts, sizes, rows = np.array([(c.start, c.size, c.sequence.line) for c in chunks], np.int64).T
    ends = np.cumsum(sizes)
    lengths, of_token = starts + sizes, np.repeat(np.arange(len(chunks)), sizes)
    positions = np.arange(len(tokens)) + (lengths - ends)[of_token]
    page, place = np.divmod(positions, cache.page_size)
    lines = tables[rows[of_token], page] * np.int64(cache.page_size) + place
    samples = np.array([c.samples for c in chunks])
    runs = [(c.sequence.slots, c.size) for c in chunks]
    ending = [(c.sequence.slots, int(c.samples)) for c in chunks]
    routing = router.route(runs)
    longest = int(lengths.max())

    def on_device(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    fed = on_device(tokens)
    if unknown and drawn is not None:
        places = np.array([drawn.places[chunks[number].sequence] for number in unknown])
        fed[on_device(ends[unknown] - 1)] = drawn.tokens[on_device(places)]
    return Batch(
        cache=cache,
        tokens=fed,
        positions=on_device(positions),
        lines=on_device(lines),
        pages=Pages(
            starts=on_device(np.concatenate([[0], ends]).astype(np.int32)),
            lengths=on_device(lengths.astype(np.int32)),
            tables=on_device(tables[:, : -(-longest // cache.page_size)].take(rows, 0)),
            longest_query=int(sizes.max()),
            longest=longest,
        ),
        outputs=on_device(ends[samples] - 1),
        routing=routing,
        output_routing=routing if ending == runs else router.route(ending),
    )


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
