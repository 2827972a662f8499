"""CUDA graphs of decode passes: a pass of one token a row is padded to a bucket, captured once and replayed for others.

A pass of a small model is hundreds of launches that the host issues one by one; a graph is one. Whatever a graph reads
lies in tensors of its own, which each pass is copied into: grids depend on their sizes alone, so a replay serves any
lengths and any adapters. Rows that pad a pass write to a page that nobody reads, and their logits are dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loramill.kernels.attention import Pages
from loramill.kernels.mixes import BASE_MIX, tile_capacity
from loramill.kernels.router import Router
from loramill.kernels.routing import TileRouting
from loramill.worker.batch import Batch
from loramill.worker.cache import KVCache
from loramill.worker.memory import ran_out

PATIENCE = 16
"""Passes of a size that go through a larger graph, if there is one, before they get their own: a job's last rows pass
every size once, and a capture takes as long as a few passes. Decoding mostly waits for the weights, which are read once
whatever the padding. Not measured."""


class Size(NamedTuple):
    """What a graph is captured for."""

    rows: int
    height: int
    """Of the tiles that rows of one mix are cut into: see `kernels.routing`."""


@dataclass(slots=True, frozen=True)
class Captured:
    """A graph and the pass that it reads."""

    graph: torch.cuda.CUDAGraph
    batch: Batch


def bucket(rows: int, most: int) -> int:
    """The rows of the graph for a pass of `rows`: 1, 2, 4, 8, 16, 24, ... and `most`."""
    return min(next((few for few in (1, 2, 4) if few >= rows), -(-rows // 8) * 8), most)


def choose(wanted: Size, captured: Collection[Size], asked: int) -> Size:
    """The graph for a pass of this size, asked for `asked` times by now; it may have to be captured first."""
    if wanted in captured or asked > PATIENCE:
        return wanted
    return min((one for one in captured if one.height == wanted.height and one.rows > wanted.rows), default=wanted)


class Graphs:
    """The graphs of one model over one cache; made as they are needed, all in one pool of memory.

    `forward` computes logits [O, vocab] of a batch; `scratch_page` is a page of the cache that nobody reads.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        cache: KVCache,
        router: Router,
        max_num_seqs: int,
        max_pages_per_row: int,
        scratch_page: int,
    ) -> None:
        self._forward, self._cache, self._router = forward, cache, router
        self._most, self.scratch_page = max_num_seqs, scratch_page
        self._tables = torch.zeros(max_num_seqs, max_pages_per_row, dtype=torch.int32, device=router.device)
        self._captured: dict[Size, Captured] = {}
        self._asked: Counter[Size] = Counter()
        self.refused: str | None = None
        """Why this model cannot be captured, once that is known."""
        self._logits: Tensor | None = None
        self._pool: Any = None

    def __len__(self) -> int:
        """How many have been captured."""
        return len(self._captured)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor | None:
        """Logits [T, vocab] of a pass in which every row has one token and gets the next, until the next call; None for
        another pass, which must be run as it is."""
        routing, rows = batch.routing, batch.tokens.shape[0]
        if self.refused or batch.pages.longest_query > 1 or batch.outputs.shape[0] != rows or rows > self._most:
            return None
        if not isinstance(routing, TileRouting) or routing.mixes is not self._router.plain:
            return None  # mixes of several adapters have a table of their own each time
        wanted = Size(bucket(rows, self._most), routing.height)
        self._asked[wanted] += 1
        size = choose(wanted, self._captured, self._asked[wanted])
        if size not in self._captured:
            try:
                self._capture(size, batch)
            except RuntimeError as error:
                if ran_out(error):
                    raise
                # Such as a rotary embedding that asks the device for the longest position.
                self.refused = str(error)
                return None
        one = self._captured[size]
        fill(one.batch, batch, self.scratch_page)
        one.graph.replay()
        assert self._logits is not None
        return self._logits[:rows]

    def forget(self) -> None:
        """The model's tensors are others now: capture anew."""
        self._captured.clear()
        self._asked.clear()

    def _capture(self, size: Size, like: Batch) -> None:
        batch = self.static(size)
        fill(batch, like, self.scratch_page)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits = self._forward(batch)  # compiles, and lets libraries take their workspaces
        torch.cuda.current_stream().wait_stream(stream)
        if self._logits is None:
            self._logits = logits.new_empty(self._most, logits.shape[1])
        del logits
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads copy adapters to the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            # One tensor for all graphs: one each would be 33 MB times 35 for 256 rows of 128,256 logits.
            self._logits[: size.rows].copy_(self._forward(batch))
        self._captured[size] = Captured(graph, batch)

    def static(self, size: Size) -> Batch:
        """A pass of so many rows, in tensors of its own; `fill` it before it is run."""
        rows, mixes = size.rows, self._router.plain
        assert mixes is not None, "only a tiled routing has a fixed size"
        device = self._tables.device

        def numbers(count: int, dtype: torch.dtype = torch.int32, value: int = 0) -> Tensor:
            return torch.full((count,), value, dtype=dtype, device=device)

        tiles = tile_capacity(rows, mixes.members.shape[0], size.height)
        routing = TileRouting(
            size.height, mixes, numbers(rows, value=BASE_MIX), numbers(rows), numbers(tiles, value=BASE_MIX),
            numbers(tiles), numbers(tiles),
        )  # fmt: skip
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        tables = self._tables[:rows]
        return Batch(
            cache=self._cache,
            tokens=numbers(rows, torch.int64),
            positions=numbers(rows, torch.int64),
            lines=numbers(rows, torch.int64),
            pages=Pages(starts, numbers(rows), tables, 1, tables.shape[1] * self._cache.page_size),
            outputs=torch.arange(rows, device=device),
            routing=routing,
            output_routing=routing,
        )


def fill(static: Batch, batch: Batch, scratch_page: int) -> None:
    """Copy a decode pass into the first rows of a larger one; the other rows are nobody's."""
    assert isinstance(static.routing, TileRouting)
    assert isinstance(batch.routing, TileRouting)
    mine, given = static.routing, batch.routing
    for kept, new, spare in (
        (static.tokens, batch.tokens, 0),
        (static.positions, batch.positions, 0),
        (static.lines, batch.lines, scratch_page * batch.cache.page_size),
        (static.pages.lengths, batch.pages.lengths, 1),
        (mine.mix_of_row, given.mix_of_row, BASE_MIX),
        (mine.order, given.order, 0),
        (mine.tile_mix, given.tile_mix, BASE_MIX),
        (mine.tile_start, given.tile_start, 0),
        (mine.tile_rows, given.tile_rows, 0),
    ):
        count = new.shape[0]
        kept[:count].copy_(new)
        kept[count:].fill_(spare)
    rows, width = batch.pages.tables.shape
    static.pages.tables[:rows, :width].copy_(batch.pages.tables)
    static.pages.tables[rows:, 0] = scratch_page
