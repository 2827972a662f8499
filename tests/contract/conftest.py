"""The stores that the contract's tests run over."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.places import ModelPlace, Place, RedisPlace, SqlitePlace

STORES = ("sqlite", "sqlite+files", "redis", "redis+files")


@pytest.fixture
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Place]:
    """Makes empty places of the kind that the test is run for."""
    kind, _, files = request.param.partition("+")
    if kind == "model":
        return ModelPlace
    if kind == "redis":
        server = request.getfixturevalue("redis_server")
        return lambda: RedisPlace(server, files=bool(files))
    return lambda: SqlitePlace(tmp_path, files=bool(files))


@pytest.fixture
def place(new_place: Callable[[], Place]) -> Place:
    """An empty one."""
    return new_place()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "new_place" in metafunc.fixturenames:
        # The state machine holds the others against the model; by itself there is nothing to hold it against.
        model = () if "machine" in metafunc.function.__name__ else ("model",)
        metafunc.parametrize("new_place", (*model, *STORES), indirect=True)
