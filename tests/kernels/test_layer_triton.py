"""What lies between projections, on the device or in Triton's interpreter, against the plain forms in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from loramill.kernels.layer import ACTIVATIONS, add_rms_norm_torch, gated_torch, rope_store_torch
from loramill.kernels.layer_triton import WIDEST, add_rms_norm, gated, rope_store

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
"""||out - ref|| / ||ref||, of up to three roundings where the formula has as many."""
PAGE = 16


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows with NaN between them."""
    wide = torch.full((*shape[:-1], shape[-1] + 16), float("nan"))
    wide[..., : shape[-1]] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return wide.to(DEVICE, dtype)[..., : shape[-1]]


def near(found: Tensor, expected: Tensor) -> bool:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return bool(error < BOUNDS[found.dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("columns", [8, 77, 896, 3584, 4096])
def test_add_rms_norm(columns: int, dtype: torch.dtype) -> None:
    x, residual = (normal(5, columns, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = normal(columns, dtype=dtype, seed=3).contiguous()
    y, s = add_rms_norm(x, residual, weight, 1e-5)
    # The interpreter makes 1e-38 of a bfloat16 zero.
    assert torch.allclose(s.double(), (x + residual).double(), rtol=0, atol=1e-30)
    assert near(y, add_rms_norm_torch(s.double(), None, weight.double(), 1e-5)[0])
    y, s = add_rms_norm(x, None, weight, 1e-5)
    assert s is x
    assert near(y, add_rms_norm_torch(x.double(), None, weight.double(), 1e-5)[0])


def test_a_row_that_no_program_takes_is_refused() -> None:
    x = normal(1, WIDEST + 1)
    with pytest.raises(ValueError, match="at most"):
        add_rms_norm(x, None, x[0], 1e-5)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (14, 2, 64), (3, 3, 80), (9, 1, 128), (2, 1, 256)])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_store(heads: int, kv_heads: int, dim: int, norms: bool, dtype: torch.dtype) -> None:
    rows = 6
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    qkv[2, -dim:] = float("inf")  # a value is stored as it is
    angles = torch.rand(rows, dim // 2, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 6
    weights = tuple(normal(dim, dtype=dtype, seed=seed).contiguous() for seed in (5, 6))
    given = (weights[0], weights[1]) if norms else None
    lines = torch.tensor([3, 79, 16, 17, 40, 0], device=DEVICE)
    keys, values, *theirs = (torch.zeros(5, kv_heads, PAGE, dim, dtype=dtype, device=DEVICE) for _ in range(4))
    q = rope_store(qkv, angles.cos(), angles.sin(), keys, values, lines, given, 1e-6)
    expected = rope_store_torch(qkv.contiguous(), angles.cos(), angles.sin(), theirs[0], theirs[1], lines, given, 1e-6)
    assert q.shape == (rows, heads, dim)
    assert near(q, expected)
    assert near(keys, theirs[0])
    assert torch.equal(values, theirs[1])


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's: 1 / (1 + inf) is meant
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("columns", [5, 96, 2048, 2100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation: str, columns: int, dtype: torch.dtype) -> None:
    gate_up = normal(4, 2 * columns, dtype=dtype) * 4
    gate_up[1, 0], gate_up[1, 1] = 300.0, -300.0
    assert near(gated(gate_up, activation), gated_torch(gate_up.double(), activation))
