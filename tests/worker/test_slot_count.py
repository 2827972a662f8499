"""How many slots there are where nobody says: by count and size of the adapters, within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramill.schemas.failures import Failure
from loramill.worker.models import open_models
from loramill.worker.settings import MODEL_FLAGS, ModelOptions, settings_from
from loramill.worker.slot_count import LEAST, MOST, slot_count

GIGA = 10**9


@pytest.mark.parametrize(
    ("adapters", "base", "slots"),
    [
        ([], 8 * GIGA, LEAST),
        ([1000] * 3, GIGA, LEAST),
        ([42_000_000] * 32, 8 * GIGA, 32),  # rank 16 over 8 billion
        ([42_000_000] * 500, 8 * GIGA, 47),
        ([42_000_000] * 31 + [168_000_000], 8 * GIGA, 11),  # all have the room of the largest
        ([900_000] * 64, 22_000_000, 64),  # 1 GiB is free to take
        ([900_000] * 512, 22_000_000, MOST),
        ([GIGA] * 20, 8 * GIGA, LEAST),
    ],
)
def test_one_slot_for_each_adapter_within_bounds(adapters: list[int], base: int, slots: int) -> None:
    assert slot_count(adapters, base) == slots


def test_what_is_given_stands(tiny_base: Path, tiny_adapters: Path) -> None:
    given = ModelOptions(base_model=str(tiny_base), adapters_dir=tiny_adapters, max_loras_per_batch=3)
    assert open_models(given).slots == 3
    assert open_models(ModelOptions(base_model=str(tiny_base), adapters_dir=tiny_adapters)).slots == LEAST


@pytest.mark.parametrize(("said", "slots"), [("auto", None), ("AUTO", None), ("12", 12)])
def test_the_variable(said: str, slots: int | None) -> None:
    environ = {"LORAMILL_BASE_MODEL": "base", "LORAMILL_MAX_LORAS_PER_BATCH": said}
    assert settings_from(environ, MODEL_FLAGS, ModelOptions).max_loras_per_batch == slots


@pytest.mark.parametrize("said", ["0", "-1", "many", "1.5"])
def test_what_is_no_number_is_refused_by_name(said: str) -> None:
    environ = {"LORAMILL_BASE_MODEL": "base", "LORAMILL_MAX_LORAS_PER_BATCH": said}
    with pytest.raises(Failure, match=r"LORAMILL_MAX_LORAS_PER_BATCH.*neither a number above 0 nor auto"):
        settings_from(environ, MODEL_FLAGS, ModelOptions)
