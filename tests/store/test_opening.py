"""From URLs to stores."""

from pathlib import Path

import pytest

from loramill.store.errors import StoreLost, StoreRefused
from loramill.store.opening import open_store
from loramill.store.redis_store import RedisStore
from loramill.store.sqlite_store import SqliteStore
from tests.contract.building import a_shard, submitted
from tests.servers import RedisServer


def test_three_slashes_are_here_and_four_are_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store("sqlite:///jobs.db") as store:
        assert isinstance(store, SqliteStore)
        submitted(store, "j", a_shard())
    with open_store(f"sqlite:///{tmp_path}/jobs.db", create=False) as store:
        assert store.job("j").total == 4
    with pytest.raises(StoreLost, match="nothing was ever submitted"):
        open_store("sqlite:///other.db", create=False)


def test_files_are_named_by_their_url(tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path}/jobs.db", files=f"file://{tmp_path}/parts") as store:
        submitted(store, "j", a_shard())
        assert [path.name for path in (tmp_path / "parts" / "j").iterdir()] == ["in-000000.zst"]
    with pytest.raises(StoreRefused, match="nosuch"):
        open_store(f"sqlite:///{tmp_path}/jobs.db", files="nosuch://parts")


def test_a_redis_is_opened_under_its_prefix(redis_server: RedisServer) -> None:
    with open_store(redis_server.url, prefix="opening") as store:
        assert isinstance(store, RedisStore)
        submitted(store, "j", a_shard())
    with open_store(redis_server.url, prefix="opening", create=False) as store:
        assert store.job("j").total == 4
    with pytest.raises(StoreLost):
        open_store(redis_server.url, prefix="opening-2", create=False)


def test_a_redis_that_forgets_must_be_asked_for(tmp_path: Path) -> None:
    with RedisServer(tmp_path, appendonly="no") as server:
        with pytest.raises(StoreRefused):
            open_store(server.url)
        with pytest.raises(StoreRefused):
            open_store(f"{server.url}?volatile=0", volatile=True)
        open_store(f"{server.url}?volatile=1").close()
        open_store(server.url, volatile=True).close()


@pytest.mark.parametrize("url", ["", "jobs.db", "/var/jobs.db", "http://host/x", "postgres://u:secret@host/db"])
def test_what_is_no_stores_url_is_refused_with_examples_and_no_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"give one such as sqlite:///jobs\.db, .*redis://") as refused:
        open_store(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite:", "sqlite://", "sqlite://jobs.db", "sqlite:///", "sqlite:////"])
def test_a_sqlite_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="names no file"):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:///jobs.db?mode=ro", "has mode: a sqlite URL takes no options"),
        ("redis://", "names no host"),
        ("redis:///0", "names no host"),
        ("redis://host/0?volatile=yes", "volatile=yes in a store's URL: give 1 or 0"),
    ],
)
def test_other_urls_that_cannot_be_meant(url: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        open_store(url)
    assert said in str(refused.value)
