"""The Triton kernels' values against the formula in float64: on the device, or in Triton's interpreter without one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from loramill.kernels.blocks import HEIGHTS, expand_blocks, shrink_blocks
from loramill.kernels.bridge import Bridge, all_slots, fold
from loramill.kernels.check import LiveRanks
from loramill.kernels.embedding import embedding_lora, looked_up
from loramill.kernels.expand import expand, expand_reference
from loramill.kernels.mixes import Mix, number_mixes
from loramill.kernels.on_device import carry_out, folded, run
from loramill.kernels.plan import Launch, Plan, Regime
from loramill.kernels.routing import Mixes, TileRouting, route_device, route_host
from loramill.kernels.rows import row_expand, row_shrink
from loramill.kernels.shrink import shrink, shrink_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}
"""||out - ref|| / ||ref||: sums in float32 and one rounding of the output, which alone is 2.1e-4 and 1.7e-3; a second
rounding passes neither."""
SLOTS = 5
RANKS = [[64, 64, 64], [8, 8, 8], [1, 3, 40], [0, 16, 0], [128, 5, 0]]
"""Live rank of each sibling in each slot: 1 to 128, mixed within a batch."""


def of(*slots: int) -> Mix:
    return tuple((slot, 1.0) for slot in slots)


def popular(rows: int, kind: str) -> list[Mix]:
    """A slot for each row, or the base, by a popularity."""
    draw = random.Random(rows)
    if kind == "identical":
        return [of(2)] * rows
    if kind == "distinct":
        return [of(row % SLOTS) for row in range(rows)]
    if kind == "skewed":
        return [of(0) if row % 16 else of(1 + row % 4) for row in range(rows)]
    weights = [1.0] * SLOTS if kind == "uniform" else [1 / (rank + 1) for rank in range(SLOTS)]
    return [of(slot) for slot in draw.choices(range(SLOTS), weights, k=rows)]


MIXED: list[Mix] = [((0, 0.5), (4, -1.5)), of(1), (), ((3, 1.0), (2, 0.25), (1, 2.0)), (), of(3), ((0, 0.5), (4, -1.5))]
BATCHES: dict[str, list[Mix]] = {
    "one row": [of(1)],
    "one row of the base": [()],
    **{f"{kind} {rows}": popular(rows, kind) for kind, rows in [("uniform", 15), ("zipf", 63), ("skewed", 17)]},
    **{f"{kind} 33": popular(33, kind) for kind in ("identical", "distinct")},
    "mixes": MIXED * 2,
    "base among them": popular(20, "zipf") + [()] * 20 + popular(3, "uniform"),
}


Form = Callable[..., Tensor]


@dataclass(slots=True, frozen=True)
class Case:
    x: Tensor
    base: Tensor
    a: Tensor
    b: Tensor
    ranks: Tensor
    widths: tuple[int, ...]
    mixes: list[Mix]
    expected: Tensor

    def error(self, y: Tensor) -> float:
        """The relative error, once what must not change has been seen not to have changed."""
        untouched = torch.ones_like(y, dtype=torch.bool)
        ranks = self.ranks.repeat_interleave(torch.tensor(self.widths, device=y.device), 1)
        for row, mix in enumerate(self.mixes):
            for slot, _ in mix:
                untouched[row] &= ranks[slot] == 0
        bits = {2: torch.int16, 4: torch.int32}[y.dtype.itemsize]
        same = y.contiguous().view(bits) == self.base.view(bits)
        assert same[untouched].all(), "what no adapter touches must stay bit for bit, and its zeros negative"
        between = y.as_strided((y.shape[0], y.stride(0)), (y.stride(0), 1))[:, y.shape[1] :]
        assert torch.isnan(between).all(), "nothing is written between rows"
        return float((y.double() - self.expected).norm() / self.expected.norm())


def live(case: Case) -> LiveRanks:
    ranks = LiveRanks(*case.ranks.shape, DEVICE)
    for slot, mine in enumerate(case.ranks.tolist()):
        ranks.put(slot, mine)
    return ranks


def strided(values: Tensor) -> Tensor:
    """The same rows with NaN between them."""
    wide = values.new_full((values.shape[0], values.shape[1] + 16), float("nan"))
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


def make(
    mixes: list[Mix],
    dtype: torch.dtype,
    k: int = 80,
    widths: tuple[int, ...] = (96, 32, 32),
    x: Tensor | None = None,
    scale: float = 1.0,
) -> Case:
    """Random weights, NaN above each live rank; x and y are strided, with NaN between their rows."""
    generator = torch.Generator().manual_seed(len(mixes))
    siblings, rank = len(widths), max(max(ranks[: len(widths)]) for ranks in RANKS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    a, b = normal(SLOTS, siblings, rank, k), normal(SLOTS, rank, sum(widths))
    ranks = torch.tensor([slot[:siblings] for slot in RANKS], dtype=torch.int32, device=DEVICE)
    drawn, base = normal(len(mixes), k) * scale, normal(len(mixes), sum(widths))
    x = drawn if x is None else x.to(drawn)
    base[:, ::3] = -0.0  # which adding nothing would turn positive
    expected = base.double()
    for row, mix in enumerate(mixes):
        for slot, weight in mix:
            only = torch.tensor([slot], device=DEVICE)
            v = shrink_reference(x[row : row + 1], a, ranks, only)
            expected[row] += weight / scale * expand_reference(v, b, widths, only)[0]
    column = 0
    for i, width in enumerate(widths):
        for slot in range(SLOTS):
            a[slot, i, RANKS[slot][i] :] = float("nan")
            b[slot, RANKS[slot][i] :, column : column + width] = float("nan")
        column += width
    return Case(strided(x), base, a, b, ranks, widths, mixes, expected)


def route(mixes: list[Mix], height: int) -> TileRouting:
    """A routing by a table before which another mix stands, where a base row's -1 would find it."""
    mix_of_row, different = number_mixes(mixes)
    table = Mixes.of(different, SLOTS, DEVICE)
    slots, weights, members = (
        torch.cat([one.new_ones(1, *one.shape[1:]), one])[1:] for one in (table.slots, table.weights, table.members)
    )
    return route_host(mix_of_row, Mixes(slots, weights, members, table.single), height)


def poisoned(case: Case, routing: TileRouting, splits: int) -> Tensor:
    """Scratch for the bridge, full of NaN."""
    size = (splits, routing.mixes.slots.shape[1], routing.rows, case.a.shape[1] * case.a.shape[2])
    return torch.full(size, float("nan"), device=DEVICE)


def grouped(case: Case, routing: TileRouting, splits: int = 1, place: int = 0) -> Tensor:
    v, y, itemsize = poisoned(case, routing, splits), strided(case.base), case.x.dtype.itemsize
    shrinks, expands = shrink_blocks(routing.height, itemsize), expand_blocks(routing.height, itemsize)
    shrink(case.x, case.a, case.ranks, routing, v, shrinks[min(place, len(shrinks) - 1)])
    expand(y, Bridge(v), case.b, case.widths, case.ranks, routing, expands[min(place, len(expands) - 1)])
    return y


def by_row(case: Case, routing: TileRouting, splits: int = 1) -> Tensor:
    v, y = poisoned(case, routing, splits), strided(case.base)
    row_shrink(case.x, case.a, case.ranks, routing, v)
    row_expand(y, Bridge(v), case.b, case.widths, case.ranks, routing)
    return y


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_grouped_tiles(batch: str, dtype: torch.dtype) -> None:
    case = make(BATCHES[batch], dtype)
    assert case.error(grouped(case, route(case.mixes, 16))) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", ["one row", "one row of the base", "uniform 15", "mixes"])
def test_rows_of_their_own(batch: str, dtype: torch.dtype) -> None:
    case = make(BATCHES[batch], dtype)
    assert case.error(by_row(case, route(case.mixes, 16))) < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("dtype", "height", "place"),
    [(d, h, p) for d in BOUNDS for h in HEIGHTS for p in range(len(shrink_blocks(h, d.itemsize)))],
    ids=str,
)
def test_every_block_size(height: int, place: int, dtype: torch.dtype) -> None:
    case = make(popular(300 if height > 16 else 70, "zipf") + [()] * 3, dtype, k=208, widths=(144, 80))
    y = grouped(case, route(case.mixes, height), splits=3, place=place)
    assert case.error(y) < BOUNDS[dtype]


@pytest.mark.parametrize("form", [grouped, by_row])
@pytest.mark.parametrize("splits", [2, 4])
def test_split_sums_are_right_and_the_same_every_time(form: Form, splits: int) -> None:
    """Also where there are more splits than blocks of K."""
    case = make(BATCHES["uniform 15"][:4], torch.float32, k=300)
    routing = route(case.mixes, 16)
    y = form(case, routing, splits)
    assert case.error(y) < BOUNDS[torch.float32]
    assert torch.equal(y, form(case, routing, splits))


@pytest.mark.parametrize("form", [grouped, by_row])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "widths"), [(77, (33, 15, 9)), (1, (1,)), (129, (31,)), (16, (16, 48, 1))])
def test_shapes_that_no_block_divides(k: int, widths: tuple[int, ...], dtype: torch.dtype, form: Form) -> None:
    case = make([*BATCHES["distinct 33"][:6], (), of(3)], dtype, k=k, widths=widths)
    assert case.error(form(case, route(case.mixes, 16))) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", ["uniform 15", "mixes"])
def test_a_product_against_every_slot(batch: str, dtype: torch.dtype) -> None:
    """What slots hold above their live ranks, NaN here, goes into the product and no further."""
    case = make(BATCHES[batch], dtype)
    y, routing = strided(case.base), route(case.mixes, 16)
    bridge = all_slots(case.x, case.a)
    expand(y, bridge, case.b, case.widths, case.ranks, routing, expand_blocks(16, dtype.itemsize)[0])
    assert case.error(y) < BOUNDS[dtype]
    y = strided(case.base)
    row_expand(y, bridge, case.b, case.widths, case.ranks, routing)
    assert case.error(y) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", ["uniform 15", "mixes", "one row"])
def test_a_base_with_adapters_folded_in(batch: str, dtype: torch.dtype) -> None:
    case = make(BATCHES[batch], dtype)
    weight = torch.randn(sum(case.widths), case.x.shape[1], generator=torch.Generator().manual_seed(1))
    bias = torch.randn(sum(case.widths), generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    base = fold(weight.to(DEVICE, dtype), bias, *case.a.shape[:3])
    base.a.copy_(case.a)
    routing = route(case.mixes, 16)
    y = folded(case.x.contiguous(), base, case.b, case.widths, live(case), routing, Plan())
    expected = case.x.double() @ base.weight.double().t() + bias.double() + case.expected - case.base.double()
    # Base and bridge leave the one product rounded: two roundings more than elsewhere.
    assert (y.double() - expected).norm() / expected.norm() < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_an_embedding_looks_its_rows_up(dtype: torch.dtype) -> None:
    case = make(BATCHES["mixes"], dtype, k=50, widths=(96,))
    tokens = torch.randint(0, 50, (len(case.mixes),), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    a = case.a[:, 0].mT.contiguous()  # [S, V, R]
    # Looking a token up is multiplying with its unit vector.
    same = make(BATCHES["mixes"], dtype, k=50, widths=(96,), x=torch.eye(50)[tokens.cpu()])
    y, routing = strided(same.base), route(same.mixes, 16)
    expand(y, looked_up(tokens, a, routing), same.b, [96], same.ranks, routing, expand_blocks(16, dtype.itemsize)[0])
    assert same.error(y) < BOUNDS[dtype]
    y = strided(same.base)
    embedding_lora(y, tokens, a, same.b, live(same), routing, Plan())
    assert same.error(y) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("regime", Regime)
def test_a_launch_carries_out_each_regime(regime: Regime) -> None:
    case = make(BATCHES["mixes"], torch.bfloat16)
    y = strided(case.base)
    launch = Launch(regime, 2, 0, 1)
    carry_out(launch, y, case.x, case.a, case.b, case.widths, case.ranks, route(case.mixes, 16))
    assert case.error(y) < BOUNDS[torch.bfloat16]


def test_the_defaults_are_carried_out() -> None:
    case = make(BATCHES["base among them"], torch.float32)
    y = strided(case.base)
    run(y, case.x, case.a, case.b, case.widths, live(case), route(case.mixes, 16), Plan())
    assert case.error(y) < BOUNDS[torch.float32]


def test_a_routing_made_on_the_device_is_as_good() -> None:
    """With room for more mixes than there are, as a CUDA graph has it."""
    case = make(BATCHES["mixes"], torch.float32)
    mix_of_row, different = number_mixes(case.mixes)
    mixes = Mixes.of(different, SLOTS, DEVICE, capacity=12, members=4)
    routing = route_device(torch.tensor(mix_of_row, dtype=torch.int32, device=DEVICE), mixes, 16)
    assert case.error(grouped(case, routing)) < BOUNDS[torch.float32]
    assert case.error(by_row(case, routing)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("form", [grouped, by_row])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_ranks_up_to_256(form: Form, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RANKS", [[256], [200], [1], [0], [33]])
    case = make(BATCHES["uniform 15"], dtype, k=64, widths=(48,))
    assert case.a.shape[2] == 256
    assert case.error(form(case, route(case.mixes, 16))) < BOUNDS[dtype]


@pytest.mark.parametrize("form", [grouped, by_row])
def test_a_row_of_nan_stays_alone(form: Form) -> None:
    case = make(BATCHES["identical 33"][:9], torch.bfloat16)
    case.x[4] = float("nan")
    y = form(case, route(case.mixes, 16))
    assert y[4].isnan().all()
    assert torch.isfinite(y[torch.arange(9, device=DEVICE) != 4]).all()


@pytest.mark.parametrize("form", [grouped, by_row])
def test_a_bridge_beyond_float16_is_no_overflow(form: Form) -> None:
    """v passes 65504 here; the answer is small again."""
    case = make(BATCHES["uniform 15"], torch.float16, scale=2.0**12)
    case.b.mul_(2.0**-12)
    assert (case.x.double() @ case.a[0, 0, :64].double().t()).abs().max() > torch.finfo(torch.float16).max
    assert case.error(form(case, route(case.mixes, 16))) < BOUNDS[torch.float16]


@pytest.mark.parametrize("form", [grouped, by_row])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_bridge_keeps_more_digits_than_its_dtype(dtype: torch.dtype, form: Form) -> None:
    """Two columns of the bridge near 1000 that differ by about 1, and a B that subtracts them."""
    case = make([of(1)] * 3, dtype, k=64, widths=(16,))
    case.x.copy_(torch.arange(1, 65) % 7)
    case.a[1, 0, :8] = 0
    case.a[1, 0, :2] = 5
    case.a[1, 0, 1, :3] = 5.25
    case.b[1, :8] = 0
    case.b[1, 0], case.b[1, 1] = -1, 1
    case.base.zero_()
    difference = case.x[:, :3].double().sum(1) * 0.25
    case.expected.copy_(difference[:, None].expand(3, 16))
    assert case.error(form(case, route(case.mixes, 16))) < 0.01


@pytest.mark.parametrize("rows_alone", [False, True])
def test_no_rank_is_computed_that_no_adapter_has(rows_alone: bool) -> None:
    """A rank of 8 does not pay for its neighbour's 64: above the live ranks, nothing is written into the bridge."""
    case = make(BATCHES["uniform 15"], torch.float32)
    case.a.nan_to_num_(1.0)
    routing = route(case.mixes, 16)
    v = poisoned(case, routing, 2)
    if rows_alone:
        row_shrink(case.x, case.a, case.ranks, routing, v)
    else:
        shrink(case.x, case.a, case.ranks, routing, v, shrink_blocks(16, 4)[0])
    slots = torch.tensor([mix[0][0] for mix in case.mixes], device=DEVICE)
    used = torch.arange(case.a.shape[2], device=DEVICE) < case.ranks[slots][..., None]
    assert torch.equal(~v.isnan(), used.view(1, 1, len(slots), -1).expand_as(v))


def test_mixes_of_more_slots_than_there_are_are_refused() -> None:
    case = make(BATCHES["one row"], torch.float32, k=50, widths=(96,))
    routing = route_host([0], Mixes.of([of(SLOTS)], SLOTS + 1, DEVICE), 16)
    tokens, a = torch.zeros(1, dtype=torch.int64, device=DEVICE), case.a[:, 0].mT.contiguous()
    with pytest.raises(ValueError, match="routing must be by mixes of 5 slots or fewer, not 6"):
        embedding_lora(strided(case.base), tokens, a, case.b, live(case), routing, Plan())
    base = fold(torch.zeros(96, 50, device=DEVICE), None, *case.a.shape[:3])
    with pytest.raises(ValueError, match="routing must be by mixes of 5 slots or fewer, not 6"):
        folded(case.x.contiguous(), base, case.b, [96], live(case), routing, Plan())
