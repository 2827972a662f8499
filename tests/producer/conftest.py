"""Fixtures of the tests about jobs that were submitted."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.producer.queued import Queue


@pytest.fixture
def queue(tmp_path: Path, tiny_base: Path) -> Iterator[Queue]:
    (tmp_path / "store").mkdir()
    made = Queue(tmp_path / "store", tiny_base)
    with made.store:
        yield made
