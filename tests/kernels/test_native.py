"""The C++ forms against those in plain torch, which say what is meant, in float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loramill.kernels import attention, layer, native, native_forms
from loramill.kernels.attention import Pages, attend_torch, store
from loramill.kernels.mixes import Mix, only
from loramill.kernels.multi_lora import Routing, multi_lora_reference
from loramill.kernels.native_lora import NativeLora
from loramill.kernels.panels import PanelForm
from loramill.kernels.segments import segments_of
from loramill.worker.packed import Delta

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler here")
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """That share an operator's tasks out, as in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def apart(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def paged(counts: list[int], lengths: list[int], heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys, values and pages of sequences, their pages shuffled and everything else NaN."""
    size = 16
    needed = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(needed) + 3).int()
    tables = torch.full((len(lengths), max(needed)), int(order[-1]), dtype=torch.int32)
    # As the cache of a CPU lies: by heads, then pages.
    keys = torch.full((2, len(order), size, dim), float("nan"), dtype=dtype).transpose(0, 1)
    values = keys.clone()
    for i, (first, length) in enumerate(zip(accumulate(needed, initial=0), lengths, strict=False)):
        tables[i, : needed[i]] = order[first : first + needed[i]]
        place = torch.arange(length)
        lines = tables[i, place // size].long() * size + place % size
        k, v = torch.randn(2, length, 2, dim).to(dtype)
        store(keys, values, k, v, lines)
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    pages = Pages(starts, torch.tensor(lengths, dtype=torch.int32), tables, max(counts), max(lengths))
    return torch.randn(sum(counts), heads, dim).to(dtype), keys, values, pages


@DTYPES
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (20, 2.0), (None, 3.0)])
@pytest.mark.parametrize(("heads", "dim"), [(6, 16), (2, 64), (6, 64), (8, 80), (8, 96), (10, 128), (32, 32)])
def test_attention(dtype: torch.dtype, heads: int, dim: int, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    q, keys, values, pages = paged([1, 5, 1, 3, 30, 1, 17, 64], [1, 5, 8, 9, 30, 17, 100, 64], heads, dim, dtype)
    out = torch.full_like(q, float("nan"))
    attention.attend(out, q, keys, values, pages, scale=dim**-0.5, window=window, softcap=softcap)
    right = torch.empty_like(q, dtype=torch.float64)
    attend_torch(
        right, q.double(), keys.double(), values.double(), pages, scale=dim**-0.5, window=window, softcap=softcap
    )
    assert apart(out, right) < BOUNDS[dtype]


@DTYPES
def test_attention_of_decoding_rows_and_of_queries_in_any_stride(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    q, keys, values, pages = paged([1] * 9, [1, 2, 15, 16, 17, 31, 33, 300, 64], 6, 32, dtype)
    strided = torch.empty(6, 9, 32, dtype=dtype).transpose(0, 1).copy_(q)
    out, right = torch.empty_like(q), torch.empty_like(q, dtype=torch.float64)
    attention.attend(out, strided, keys, values, pages, scale=0.2)
    attend_torch(right, q.double(), keys.double(), values.double(), pages, scale=0.2)
    assert apart(out, right) < BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("heads", [2, 6])
def test_a_nan_that_was_computed_stays_one_and_harms_no_neighbour(dtype: torch.dtype, heads: int) -> None:
    q, keys, values, pages = paged([1, 1], [20, 20], heads, 32, dtype)
    q[0, 1] = float("nan")
    out = torch.empty_like(q)
    attention.attend(out, q, keys, values, pages, scale=1.0)
    assert out.isnan().all(-1).tolist() == [[head == 1 for head in range(heads)], [False] * heads]


@DTYPES
@pytest.mark.parametrize("size", [16, 48, 100, 768])
def test_norms(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(2)
    x, residual, weight = torch.randn(5, size).to(dtype), torch.randn(5, size).to(dtype), torch.randn(size).to(dtype)
    for other in (None, residual):
        y, s = layer.add_rms_norm(x, other, weight, 1e-5)
        right_y, right_s = layer.add_rms_norm_torch(
            x.double(), None if other is None else other.double(), weight.double(), 1e-5
        )
        assert apart(s, right_s) < BOUNDS[dtype]
        assert apart(y, right_y) < BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_what_it_leaves_in_the_cache(dtype: torch.dtype, dim: int, normed: bool) -> None:
    torch.manual_seed(3)
    rows, heads, kv_heads = 7, 4, 2
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim).to(dtype)
    angle = torch.rand(rows, dim // 2) * 6
    lines = torch.randperm(3 * 16)[:rows]
    norms = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)) if normed else None
    caches = []
    for wide in (False, True):
        kept = torch.zeros(2, 3, kv_heads, 16, dim, dtype=torch.float64 if wide else dtype)
        given = norms and tuple(weight.double() if wide else weight for weight in norms)
        form = layer.rope_store_torch if wide else layer.rope_store
        q = form(qkv.double() if wide else qkv, angle.cos(), angle.sin(), *kept, lines, given, 1e-6)
        caches.append((q, kept))
    for found, right in zip(*caches, strict=True):
        assert apart(found, right) < BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("activation", layer.ACTIVATIONS)
def test_gates(dtype: torch.dtype, activation: str) -> None:
    gate_up = torch.cat([torch.linspace(-30, 30, 990).view(9, 110), torch.randn(9, 110)], 1).to(dtype)
    assert apart(layer.gated(gate_up, activation), layer.gated_torch(gate_up.double(), activation)) < BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("size", [5, 16, 1000, 32768])
def test_the_largest_of_a_row(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(5)
    x = torch.randn(6, size + 3).to(dtype)[:, :size]
    x[1, size // 2 :] = x[1].max()  # the first of several
    x[2, -1], x[3, 0], x[4, 1] = 99.0, float("inf"), float("nan")
    x[5] = float("-inf")
    values, places = layer.largest(x)
    assert places.tolist() == [int(row.float().argmax()) if i != 4 else 0 for i, row in enumerate(x)]
    torch.testing.assert_close(values, x.float().max(-1).values, equal_nan=True, rtol=0, atol=0)


def test_sizes_that_are_no_whole_vectors_attend_in_torch() -> None:
    keys = torch.zeros(1, 1, 16, 24)
    assert not native_forms.attends(keys, keys)


@pytest.mark.skipif("amx_bf16" not in Path("/proc/cpuinfo").read_text(), reason="this processor has no matrix unit")
def test_vectors_serve_where_the_matrix_unit_is_not_to() -> None:
    which = "lora or at_once or attention or nan"
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", which, "-p", "no:cacheprovider"]
    without = {**os.environ, "LORAMILL_AMX": "0"}
    done = subprocess.run(command, env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    ask = [sys.executable, "-c", "from loramill.kernels.native import matrix_unit; print(matrix_unit())"]
    assert subprocess.check_output(ask, env=without, text=True) == "False\n"


def test_without_a_compiler_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "g++")
    assert native.operators.__wrapped__() is None
    assert "no C++ compiler" in caplog.text


def test_a_compiler_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    assert native.operators.__wrapped__() is None
    assert "no-such-flag" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


def lora_operands(
    dtype: torch.dtype, widths: list[int], k_size: int, ranks: list[list[int]]
) -> tuple[NativeLora, Tensor, Tensor]:
    """Slots of these live ranks, and the same numbers as the reference takes them."""
    largest = max(map(max, ranks))
    a = torch.zeros(len(ranks), len(widths), largest, k_size)
    b = torch.zeros(len(ranks), largest, sum(widths))
    native_slots = NativeLora(len(ranks), PanelForm(widths, k_size, dtype))
    for slot, of_siblings in enumerate(ranks):
        deltas: list[Delta | None] = []
        columns = b[slot].split(widths, 1)
        for i, rank in enumerate(of_siblings):
            delta = Delta((torch.randn(rank, k_size) / 4).to(dtype), torch.randn(rank, widths[i]).to(dtype))
            a[slot, i, :rank] = delta.a.float()
            columns[i][:rank] = delta.b.float()
            deltas.append(delta if rank else None)
        native_slots.put(slot, [None] * len(widths))  # what a slot held before leaves nothing behind
        native_slots.put(slot, deltas)
    return native_slots, a, b


RUNS = {
    "one": [(only(1), 1)],
    "decode": [((), 3), (only(0), 1), (only(1), 7), (only(2), 8), (only(3), 15)],
    "prefill": [(only(3), 200), ((), 5), (only(1), 61)],
    "mixes": [(((0, 0.5), (1, -2.0)), 9), (((1, 1.0), (2, 1.0), (3, 0.25)), 33), (only(2), 4)],
    "none": [((), 6)],
}


@DTYPES
@pytest.mark.parametrize(("widths", "k_size"), [([48, 16, 16], 70), ([80], 256), ([64, 64], 34)])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_multi_lora(dtype: torch.dtype, widths: list[int], k_size: int, runs: list[tuple[Mix, int]]) -> None:
    torch.manual_seed(4)
    ranks = [[8] * len(widths), [1] * len(widths), [0, 5, 0][: len(widths)], [64, 3, 17][: len(widths)]]
    slots, a, b = lora_operands(dtype, widths, k_size, ranks)
    rows = sum(count for _, count in runs)
    segments = segments_of(runs)
    x, wide = torch.randn(rows, k_size).to(dtype), torch.randn(rows, sum(widths) + 3).to(dtype)
    y, right = wide[:, : sum(widths)], wide[:, : sum(widths)].double()
    multi_lora_reference(right, x, a, b, widths, segments)
    routing = Routing(segments, torch.device("cpu"))
    if len(widths) == 2:
        for number, activation in enumerate(layer.ACTIVATIONS):
            assert apart(slots.gated(y, x, routing, number), layer.gated_torch(right, activation)) < BOUNDS[dtype]
    slots.add(y, x, routing)
    assert apart(y, right) < BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_what_follows_is_the_same_when_it_is_done_at_once(dtype: torch.dtype, runs: list[tuple[Mix, int]]) -> None:
    torch.manual_seed(6)
    rows, dim = sum(count for _, count in runs), 16
    routing = Routing(segments_of(runs), torch.device("cpu"))
    x = torch.randn(rows, 96).to(dtype)

    def product(widths: list[int]) -> tuple[NativeLora, Tensor, Tensor]:
        slots, _, _ = lora_operands(dtype, widths, 96, [[8] * len(widths), [3] * len(widths), [16] * len(widths)] * 2)
        y = torch.randn(rows, sum(widths)).to(dtype)
        added = y.clone()
        slots.add(added, x, routing)
        assert torch.equal(y, added) == (not routing.segments)
        return slots, y, added

    slots, y, added = product([40 * 16])
    residual, weight = torch.randn_like(y), torch.randn(y.shape[1]).to(dtype)
    found = slots.normed(y, x, routing, residual, weight, 1e-5)
    for one, right in zip(found, layer.add_rms_norm(residual, added, weight, 1e-5), strict=True):
        assert torch.equal(one, right)

    slots, y, added = product([4 * dim, 2 * dim, 2 * dim])
    angle, lines = torch.rand(rows, dim // 2) * 6, torch.randperm((rows // 16 + 1) * 16)[:rows]
    caches = [torch.zeros(2, rows // 16 + 1, 2, 16, dim, dtype=dtype) for _ in range(2)]
    q = slots.roped(y, x, routing, angle.cos(), angle.sin(), *caches[0], lines)
    assert torch.equal(q, layer.rope_store(added, angle.cos(), angle.sin(), *caches[1], lines))
    assert torch.equal(*caches)


def test_slots_that_leave_a_projection_alone_cost_nothing() -> None:
    slots = NativeLora(2, PanelForm([16], 32, torch.float32))
    slots.put(1, [None])
    y = torch.zeros(4, 16)
    slots.add(y, torch.randn(4, 32), Routing(segments_of([(only(1), 4)]), torch.device("cpu")))
    assert not y.any()
