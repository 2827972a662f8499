"""One CUDA graph serves every mix: captured once, replayed with more and fewer segments than at capture."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loramill.kernels.check import LiveRanks
from loramill.kernels.mixes import BASE_MIX, Mix
from loramill.kernels.multi_lora import multi_lora
from loramill.kernels.plan import Entry, Launch, Plan, Regime, Shape
from loramill.kernels.routing import Mixes, route_device

SLOTS, RANK, K, WIDTHS = 12, 64, 256, (160, 64, 64)
CAPACITY, MEMBERS = 24, 3
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
"""||y - ref|| / ||ref|| beyond what rounding the reference once gives: a second rounding does not pass."""
RANKS = (64, 8, 1, 16, 40)


class Fixed:
    """The tensors that a graph reads and writes, and the formula over what they hold, in float64."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.draw = torch.Generator().manual_seed(rows)
        self.dtype = dtype
        n = sum(WIDTHS)
        self.x = torch.zeros(rows, K, dtype=dtype, device=device)
        self.base, self.y = (torch.zeros(rows, n, dtype=dtype, device=device) for _ in range(2))
        self.a = torch.zeros(SLOTS, len(WIDTHS), RANK, K, dtype=dtype, device=device)
        self.b = torch.zeros(SLOTS, RANK, n, dtype=dtype, device=device)
        self.ranks = LiveRanks(SLOTS, len(WIDTHS), device)
        self.mix_of_row = torch.full((rows,), BASE_MIX, dtype=torch.int32, device=device)
        self.mixes = Mixes.of([], SLOTS, device, capacity=CAPACITY, members=MEMBERS)
        self.table: list[Mix] = []

    def fill(self, table: list[Mix], mix_of_row: list[int]) -> None:
        """New rows, new weights with new live ranks in every slot (NaN above them), and a new mix of adapters."""
        for tensor in (self.x, self.base, self.a, self.b):
            tensor.copy_(torch.randn(tensor.shape, generator=self.draw).to(self.dtype))
        self.y.copy_(self.base)
        for slot in range(SLOTS):
            ranks = [RANKS[int(torch.randint(len(RANKS), (), generator=self.draw))] for _ in WIDTHS]
            ranks[slot % 3] = 0 if slot % 4 == 0 else ranks[slot % 3]
            self.ranks.put(slot, ranks)
            column = 0
            for sibling, width in enumerate(WIDTHS):
                self.a[slot, sibling, ranks[sibling] :] = float("nan")
                self.b[slot, ranks[sibling] :, column : column + width] = float("nan")
                column += width
        self.table = table
        self.mixes.copy_(Mixes.of(table, SLOTS, self.x.device, capacity=CAPACITY, members=MEMBERS))
        self.mix_of_row.copy_(torch.tensor(mix_of_row, dtype=torch.int32))

    def expected(self) -> Tensor:
        y = self.base.double()
        for row, number in enumerate(self.mix_of_row.tolist()):
            for slot, weight in self.table[number] if number != BASE_MIX else ():
                column = 0
                for sibling, (width, live) in enumerate(zip(WIDTHS, self.ranks[slot], strict=True)):
                    v = self.a[slot, sibling, :live].double() @ self.x[row].double()
                    y[row, column : column + width] += (
                        weight * v @ self.b[slot, :live, column : column + width].double()
                    )
                    column += width
        return y

    def check(self) -> None:
        expected = self.expected()
        once = expected.to(self.dtype).double() - expected
        assert (self.y.double() - expected).norm() - once.norm() < BOUNDS[self.dtype] * expected.norm() + 1e-30
        untouched = self.mix_of_row == BASE_MIX
        assert torch.equal(self.y[untouched], self.base[untouched])


def of(*slots: int) -> Mix:
    return tuple((slot, 1.0) for slot in slots)


def batches(rows: int) -> dict[str, tuple[list[Mix], list[int]]]:
    """By name, a table of mixes and the mix of each row; the first is what is captured."""
    draw = random.Random(rows)
    singles = [of(slot) for slot in range(SLOTS)]
    mixed: list[Mix] = [((0, 0.5), (4, -1.5)), of(1), ((3, 1.0), (2, 0.25), (1, 2.0)), ((5, -1.0),)]
    many = [*singles, *mixed, *singles[:8]]
    return {
        "at capture, four": (singles[:4], [row * 4 // rows for row in range(rows)]),
        "one": (singles[3:4], [0] * rows),
        "every slot, shuffled": (singles, [draw.randrange(SLOTS) for _ in range(rows)]),
        "every mix there is room for": (many, [draw.randrange(CAPACITY) for _ in range(rows)]),
        "base among them": (mixed, [draw.randrange(-1, 4) for _ in range(rows)]),
        "base alone": ([], [BASE_MIX] * rows),
        "four again, others": (singles[8:], [3 - row * 4 // rows for row in range(rows)]),
    }


def plan_for(regime: Regime, height: int, rows: int, dtype: torch.dtype) -> Plan:
    shape = Shape(height, rows, RANK, K, sum(WIDTHS), str(dtype).removeprefix("torch."))
    return Plan((Entry(shape, Launch(regime, 2, 0, 0)),))


def replayed(fixed: Fixed, rows: int, step: Callable[[], None], replay: Callable[[], None] | None = None) -> None:
    """Capture `step` over the first batch, then replay it over all of them, checking each."""
    captured, *_ = batches(rows).values()
    fixed.fill(*captured)
    if replay is None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    for table, mix_of_row in batches(rows).values():
        fixed.fill(table, mix_of_row)
        replay()
        fixed.check()
        kept = fixed.y.clone()
        fixed.y.copy_(fixed.base)
        replay()
        assert torch.equal(fixed.y, kept), "the same answer every time"


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("regime", "height", "rows"),
    [
        (Regime.GROUPED, 16, 96),
        (Regime.GROUPED, 64, 300),
        (Regime.GROUPED, 128, 300),
        (Regime.ROWS, 16, 5),
        (Regime.ROWS, 16, 96),
    ],
)
def test_a_graph_serves_more_and_fewer_segments_than_at_capture(
    regime: Regime, height: int, rows: int, dtype: torch.dtype
) -> None:
    fixed = Fixed(rows, dtype, torch.device("cuda"))
    plan = plan_for(regime, height, rows, dtype)

    def step() -> None:
        routing = route_device(fixed.mix_of_row, fixed.mixes, height)
        multi_lora(fixed.y, fixed.x, fixed.a, fixed.b, WIDTHS, fixed.ranks, routing, plan)

    replayed(fixed, rows, step)
