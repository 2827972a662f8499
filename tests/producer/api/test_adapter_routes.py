"""`/v1/adapters` over a real store, with a worker whose engine is a stub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loramill.producer import adapters_wanted_command
from loramill.producer.adapter_wishes import check_source
from loramill.producer.api import adapters
from loramill.producer.api.context import Caller
from loramill.producer.cli import main
from loramill.producer.served import published
from loramill.schemas.errors import LineError
from loramill.schemas.request import parse_line
from loramill.store.contract import JobStore
from loramill.store.sqlite_store import SqliteStore
from loramill.worker.node import Node
from tests.producer.api.asking import asking
from tests.stub_engine import manifest
from tests.worker.queueing import staged, until, working


def make(root: Path, name: str, rank: int = 4) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "adapter_config.json").write_text(json.dumps({"r": rank}))


def error_of(answer: Any) -> tuple[int, str | None, str | None]:
    said = answer.json()["error"]
    return answer.status_code, said["code"], said["param"]


def names(client: TestClient) -> list[str]:
    listed = client.get("/v1/adapters").json()
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert (listed["first_id"], listed["last_id"]) == (listed["data"][0]["id"], listed["data"][-1]["id"])
    return [one["id"] for one in listed["data"]]


def test_load_look_replace_unload(store: JobStore, root: Path, worker: Node) -> None:
    make(root, "sql")
    with asking(store) as [client]:
        assert len(names(client)) == 16
        loaded = client.post("/v1/adapters", json={"name": "sql", "scale": 0.5})
        assert loaded.status_code == 200, loaded.text
        first = loaded.json()
        assert (first["status"], first["workers"], first["rank"], first["scale"]) == ("served", ["here"], 4, 0.5)
        assert names(client) == [*(f"a{at:02}" for at in range(16)), "sql"]
        make(root, "sql", rank=8)
        second = client.post("/v1/adapters", json={"name": "sql"}).json()
        assert (second["rank"], second["scale"]) == (8, 1.0)
        assert second["sha256"] != first["sha256"]
        assert client.get("/v1/adapters/sql").json() == second
        gone = client.delete("/v1/adapters/sql")
        assert (gone.status_code, gone.json()) == (200, {"id": "sql", "object": "adapter", "deleted": True})
        assert error_of(client.get("/v1/adapters/sql"))[:2] == (404, "adapter_not_found")
        assert error_of(client.delete("/v1/adapters/sql"))[:2] == (404, "adapter_not_found")
        assert len(names(client)) == 16


def test_one_that_the_worker_was_started_with_goes_and_no_new_row_may_name_it(store: JobStore, worker: Node) -> None:
    row = parse_line(json.dumps({"id": "1", "adapter": "a03", "prompt": "x"}).encode())
    assert published(store, None).offer.names.resolve(row)
    with asking(store) as [client]:
        assert client.get("/v1/models/a03").status_code == 200
        assert client.delete("/v1/adapters/a03").json()["deleted"]
        until(lambda: client.get("/v1/models/a03").status_code == 404)
        assert "a03" not in [one["id"] for one in client.get("/v1/models").json()["data"]]
        with pytest.raises(LineError, match="an operator has unloaded it"):
            published(store, None).offer.names.resolve(row)
        refused = client.post("/v1/adapters", json={"name": "a03"})
        assert error_of(refused) == (400, "adapter_refused", "source")
        assert "no such folder" in refused.json()["error"]["message"]


def test_rows_are_counted_and_who_has_it_resident_is_seen(store: JobStore, worker: Node) -> None:
    staged(store, "j", ["row"] * 3)
    with asking(store) as [client]:
        until(lambda: store.job("j").status.ended)
        assert client.get("/v1/adapters/a00").json()["rows"]["completed"] == 0
        assert client.get("/v1/adapters/a00").json()["resident"] == []


def test_each_caller_sees_its_own_and_operators_alone_may_change_them(
    store: JobStore, root: Path, worker: Node
) -> None:
    operator, some = Caller("boss"), Caller("lab", operator=False, adapters=("a0*",))
    with asking(store, operator, some) as [boss, lab]:
        refused = boss.post("/v1/adapters", json={"name": "a07x", "source": "not/there"})
        assert error_of(refused)[:2] == (400, "adapter_refused")
        seen = boss.get("/v1/adapters/a07x").json()
        assert (seen["status"], seen["source"], seen["sha256"]) == ("refused", "not/there", None)
        assert "no such folder" in seen["refused"]["here"]
        for_others = lab.get("/v1/adapters/a07x").json()
        assert (for_others["refused"], for_others["source"]) == ({}, None)
        assert all(name.startswith("a0") for name in names(lab))
        assert error_of(lab.get("/v1/adapters/a15"))[:2] == (404, "adapter_not_found")
        assert error_of(lab.post("/v1/adapters", json={"name": "a01"}))[:2] == (403, "operators_only")
        assert error_of(lab.delete("/v1/adapters/a01"))[:2] == (403, "operators_only")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "../x"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": 3}, "name"),
        ({"name": "x", "source": "/etc/passwd"}, "source"),
        ({"name": "x", "source": "a/../../b"}, "source"),
        ({"name": "x", "source": "a\0b"}, "source"),
        ({"name": "x", "source": ""}, "source"),
        ({"name": "x", "source": "./"}, "source"),
        ({"name": "x", "scale": 0}, "scale"),
        ({"name": "x", "scale": 1001}, "scale"),
        ({"name": "x", "scale": "much"}, "scale"),
        ({"name": "x", "folder": "y"}, "folder"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(body: dict[str, Any], param: str, store: JobStore) -> None:
    with asking(store) as [client]:
        assert error_of(client.post("/v1/adapters", json=body)) == (400, "invalid_request", param)
    assert store.shelf.records("adapter") == []


def test_nobody_is_there_to_answer(store: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "ANSWER_S", 0.1)
    with asking(store) as [client]:
        later = client.post("/v1/adapters", json={"name": "sql"})
        assert (later.status_code, later.json()["status"]) == (202, "waiting")
        assert client.get("/v1/adapters").json()["data"][0]["id"] == "sql"
        gone = client.delete("/v1/adapters/sql")
        assert (gone.status_code, gone.json()["deleted"]) == (202, False)


def test_an_alias_keeps_its_adapter(store: JobStore) -> None:
    from tests.contract.building import a_worker

    led = manifest()[0].model_copy(
        update={"aliases": {"best": {"a00": 0.5, "a01": 0.5}}, "routes": {"k": {"*": "a02"}}}
    )
    store.publish(led)
    store.hello(a_worker("w", led))
    with asking(store) as [client]:
        for name, by in {"a00": "the alias `best`", "a02": "the route by `k`"}.items():
            kept = client.delete(f"/v1/adapters/{name}")
            assert error_of(kept)[:2] == (400, "adapter_in_use")
            assert by in kept.json()["error"]["message"]


def run(store: JobStore, *arguments: str, url: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["adapters", *arguments, "--store", url])
    return int(ended.value.code or 0)


def test_the_same_by_command(
    store: JobStore, root: Path, tmp_path: Path, worker: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    make(root, "deep/sql")
    assert run(store, "load", "sql", "deep/sql", "--scale", "2", url=url) == 0
    assert "is served by here" in capsys.readouterr().err
    assert run(store, "load", "no", url=url) == 4
    assert "no such folder" in capsys.readouterr().err
    assert run(store, "load", "no", "../up", url=url) == 2
    assert run(store, "unload", "sql", url=url) == 0
    assert "is let go of" in capsys.readouterr().err
    assert run(store, "unload", "sql", url=url) == 4


def test_by_command_before_there_is_a_worker(
    store: JobStore, root: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    make(root, "sql")
    assert run(store, "load", "sql", url=f"sqlite:///{tmp_path}/jobs.db") == 0
    assert "those that run next will load it" in capsys.readouterr().err
    with working(SqliteStore(tmp_path / "jobs.db"), adapters_dir=root), asking(store) as [client]:
        until(lambda: client.get("/v1/adapters/sql").json()["status"] == "served")


def test_paths_lead_down() -> None:
    assert check_source("a/b.c-d") == "a/b.c-d"
    assert adapters_wanted_command.check_source is check_source
