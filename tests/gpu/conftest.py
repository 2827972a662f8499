"""What only a CUDA device can show. Without one every test here is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from tests.worker.conftest import answer, family, make_engine, quiet  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    """Skips without a device; float32 is float32 here, not TF32."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
