"""Adapters as host memory holds them: of the size that was said, and what the slots are filled from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from loramill.kernels import native
from loramill.kernels.native_lora import NativeLora
from loramill.kernels.panels import PanelForm, Panels
from loramill.worker.adapters import CONFIG, WEIGHTS, Adapter
from loramill.worker.host_form import HostForm, Laid
from loramill.worker.lora import FusedLinear
from loramill.worker.model import Model
from loramill.worker.packed import Delta, Packed, Part, Target
from loramill.worker.tensor_file import read
from loramill.worker.tensor_names import Rows

COMPILED = pytest.mark.skipif(native.operators() is None, reason="there is no C++ compiler here")


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_the_size_that_was_said(name: str, dtype: str, family: Callable[[str], Any]) -> None:
    one = family(name)
    model = Model(one.base, dtype, "cpu", slots=1)
    form = HostForm(model.projections, model.dtype, pin=False)
    for adapter in one.adapters:
        held = form.read(adapter)
        assert held.nbytes == form.nbytes(adapter)
        if isinstance(held, Packed):
            continue
        assert {name for names in held.panels for name in names} >= set(adapter.targets)
        model.put(0, held)
        for projection in model.projections:
            panels = held.panels.get(projection.names)
            # Nothing is copied: the slot points into what is held.
            filled = None if projection.lora is None else projection.lora._held[0]
            assert filled is panels or (panels is None and filled.ranks == (0,) * len(projection.names))


def test_panels_where_everything_takes_them(family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one = family("qwen2")

    def kinds() -> list[bool]:
        model = Model(one.base, "float32", "cpu", slots=1)
        form = HostForm(model.projections, model.dtype, pin=False)
        return [isinstance(form.read(adapter), Laid) for adapter in one.adapters]

    if native.operators() is not None:
        # The last one changes the head too, whose 97 rows fill no whole vectors.
        assert kinds() == [True, True, True, True, False]
    monkeypatch.setattr("loramill.kernels.native.operators", lambda: None)
    assert not any(kinds())


PARTS = {
    # In panels of 16 rows and steps of 1 or 2 numbers: ranks and rows that are no multiple of either, and a gap.
    "m.q_proj": [(5, Rows(0, 32), Rows(0, 32), 2.0)],
    "m.v_proj": [(18, Rows(8, 56), Rows(0, 48), 0.3)],
    "m.qkv_proj": [
        (5, Rows(0, 37), Rows(0, 37), 1.0),
        (2, Rows(0, 16), Rows(37, 53), 0.7),
        (16, Rows(3, 23), Rows(60, 80), -1.5),
    ],
    "m.down_proj": [(1, Rows(0, 160), Rows(0, 160), 1 / 3)],
    "m.up_proj": [(32, Rows(0, 16), Rows(0, 16), 8.0)],
}
WIDTHS = {
    ("m.q_proj", "m.k_proj", "m.v_proj"): (32, 16, 48),
    ("m.qkv_proj",): (80,),
    ("m.o_proj",): (16,),
    ("m.down_proj",): (160,),
    ("m.up_proj",): (16,),
}
K_SIZE = 302


def adapter_of_all_kinds(folder: Path, dtypes: Sequence[torch.dtype], odd: int) -> Adapter:
    """One whose tensors are of these dtypes in turn, in a file of weights whose data begin at such an address."""
    source = torch.Generator().manual_seed(0)
    kinds, tensors, targets = cycle(dtypes), dict[str, torch.Tensor](), dict[str, Target]()

    def tensor(name: str, *shape: int) -> str:
        sizes = torch.randint(-150, 20, shape, generator=source).double().exp2()  # down to what is subnormal in some
        tensors[name] = (torch.randn(shape, generator=source, dtype=torch.float64) * sizes).to(next(kinds))
        return name

    for module, parts in PARTS.items():
        made = [
            Part(
                tensor(f"{module}.{n}.a", rank, K_SIZE), tensor(f"{module}.{n}.b", source.stop, rank),
                *(rank, scale, source, target),
            )
            for n, (rank, source, target, scale) in enumerate(parts)
        ]  # fmt: skip
        width = next(
            dict(zip(names, widths, strict=True))[module] for names, widths in WIDTHS.items() if module in names
        )
        targets[module] = Target(tuple(made), width, K_SIZE)
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    (folder / WEIGHTS).write_bytes(
        (length + odd).to_bytes(8, "little") + data[8 : 8 + length] + b" " * odd + data[8 + length :]
    )
    (folder / CONFIG).write_text("{}")
    sha256 = read(str(folder), b"{}").sha256
    return Adapter(str(folder), sha256, 32, targets, {}, {}, {}, 0, ())


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("saved", "odd"),
    [
        *(((one,), odd) for one in (torch.float32, torch.bfloat16, torch.float16, torch.float64) for odd in (0, 1)),
        ((torch.float16, torch.float64, torch.bfloat16, torch.float32, torch.bfloat16), 3),
    ],
    ids=str,
)
def test_the_numbers_of_the_packed_form_bit_by_bit(
    dtype: torch.dtype, saved: Sequence[torch.dtype], odd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of_all_kinds(tmp_path, saved, odd)
    projections = [
        FusedLinear(
            names, [torch.nn.Linear(K_SIZE, width, bias=False, dtype=dtype) for width in widths], 1, is_head=False
        )
        for names, widths in WIDTHS.items()
    ]
    deltas = adapter.packed(dtype).deltas
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", of_nan)
        held = HostForm(projections, dtype, pin=False).read(adapter)
    assert isinstance(held, Laid)
    assert held.panels.keys() == WIDTHS.keys() - {("m.o_proj",)}
    for names, panels in held.panels.items():
        assert [rank > 0 for rank in panels.ranks] == [name in PARTS for name in names]
        check_panels(panels, [deltas.get(name) for name in names], WIDTHS[names], K_SIZE)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_laid_out_alike(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slot takes of an adapter that is not held in panels: B [rank, width], read across."""
    widths, ranks = [32, 16, 48, 16], [5, 0, 18, 1]
    deltas = [
        Delta(torch.randn(rank, K_SIZE).to(dtype), torch.randn(rank, width).to(dtype)) if rank else None
        for rank, width in zip(ranks, widths, strict=True)
    ]
    slots = NativeLora(1, PanelForm(widths, K_SIZE, dtype))
    monkeypatch.setattr(torch, "empty", of_nan)
    slots.put(0, deltas)
    panels = slots._held[0]
    assert panels is not None
    check_panels(panels, deltas, widths, K_SIZE)


def check_panels(panels: Panels, deltas: Sequence[Delta | None], widths: Sequence[int], k_size: int) -> None:
    """Every number has its place, and the rest is zero."""
    step = PanelForm(widths, k_size, panels.a.dtype).step

    def plain(flat: torch.Tensor, depth: int) -> torch.Tensor:
        """[lanes, depth], the numbers' bits."""
        shape = -1, depth // step, native.LANES, step
        return bits(flat).view(shape).permute(0, 2, 1, 3).reshape(-1, depth)

    a, b, row = plain(panels.a, k_size), panels.b, 0
    for delta, rank, width in zip(deltas, panels.ranks, widths, strict=True):
        of_b, b = b[: rank * width], b[rank * width :]
        if delta is not None:
            live = len(delta.a)
            assert torch.equal(a[row : row + live], bits(delta.a))
            assert torch.equal(plain(of_b, rank)[:, :live], bits(delta.b.t().contiguous()))
            assert not a[row + live : row + rank].any()
            assert not plain(of_b, rank)[:, live:].any()
        row += rank
    assert not a[row:].any()
    assert not len(b)


def of_nan(size: int, *, dtype: torch.dtype) -> torch.Tensor:
    """Memory that held something else before."""
    return torch.full((size,), torch.nan, dtype=dtype)


def bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(torch.int16 if numbers.itemsize == 2 else torch.int32)
