"""Whose a thing is: another key does not find it, on any route, and without a key there is nothing at all."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi.routing import APIRoute

from loramill import Producer
from loramill.producer.api.app import ROUTERS
from tests.serving import MAIN, STUB, Server
from tests.worker.queueing import until

FREE = {"/healthz", "/readyz"}
NOBODYS = {"/static/{name}"}
"""Paths of what everybody has who has a key."""
OF_COMMANDS = {"/jobs/{id}/results", "/jobs/{id}/errors", "/jobs/{id}/retry"}
"""Paths of jobs that are no batches: those of who is at the machine, which operators find."""
FILE = ("in.jsonl", json.dumps({"custom_id": "r", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}))


def routes() -> list[tuple[str, str]]:
    """Every method and path that the server has, with or without a place in the OpenAPI document."""
    found = [route for router in ROUTERS for route in router.routes]
    assert all(isinstance(route, APIRoute) for route in found), "say below how to ask what is no route"
    return sorted((method, route.path) for route in found for method in route.methods)  # type: ignore[attr-defined]


_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


def parameters(path: str) -> list[str]:
    return _PARAMETER.findall(path)


def filled(path: str, value_of: Callable[[str], str]) -> str:
    """The path with values for its parameters."""
    return _PARAMETER.sub(lambda found: value_of(found[1]), path)


@dataclass
class Site:
    """A server, and its keys by their names."""

    server: Server
    keys: dict[str, str]

    def client(self, name: str) -> openai.OpenAI:
        """The official client, with the key of that name."""
        return openai.OpenAI(base_url=self.server.api, api_key=self.keys[name], max_retries=0)

    def ask(self, method: str, path: str, name: str | None) -> httpx2.Response:
        """One request, with some body where one belongs."""
        headers = {"authorization": f"Bearer {self.keys[name]}"} if name else {}
        given: dict[str, Any] = {}
        if path.endswith("/parts"):
            given = {"files": {"data": b"123"}}
        elif method == "POST" and path.endswith("/complete"):
            given = {"json": {"part_ids": ["part_x"]}}
        elif method == "POST" and not path.endswith(("/cancel", "/retry")):
            given = {"json": {}}
        return httpx2.request(method, f"{self.server.url}{path}", headers=headers, timeout=60, **given)


def new_key(file: Path, name: str, *flags: str) -> str:
    code = [sys.executable, "-c", MAIN, "keys", "new", name, "--keys", str(file), *flags]
    return subprocess.run(code, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1].strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("serve")
    file = folder / "keys.toml"
    keys = {
        "owner": new_key(file, "owner"),
        "other": new_key(file, "other", "--adapters", "a01"),
        "operator": new_key(file, "operator", "--operator"),
    }
    with Server(folder, *STUB, "--keys", file) as server:
        yield Site(server.ready(), keys)


def make_file(site: Site) -> str:
    with site.client("owner") as client:
        return client.files.create(file=(FILE[0], FILE[1].encode()), purpose="batch").id


def make_batch(site: Site) -> str:
    with site.client("owner") as client:
        batch = client.batches.create(
            input_file_id=make_file(site), endpoint="/v1/completions", completion_window="24h"
        )
        until(lambda: client.batches.retrieve(batch.id).status == "completed", 90)
        return batch.id


def make_upload(site: Site) -> str:
    with site.client("owner") as client:
        return client.uploads.create(bytes=3, filename=FILE[0], mime_type="application/jsonl", purpose="batch").id


def make_job(site: Site) -> str:
    """As a command does, without a key."""

    async def make() -> str:
        async with Producer(f"sqlite:///{site.server.folder}/loramill.db") as producer:
            job = await producer.submit([{"prompt": "x"}])
            return (await producer.wait(job.id, 90)).id

    return asyncio.run(make())


THINGS: dict[str, Callable[[Site], str]] = {
    "file_id": make_file,
    "batch_id": make_batch,
    "upload_id": make_upload,
    "model": lambda site: "a00",
    "name": lambda site: "a00",
    "id": make_batch,  # of the job that it is
}
"""What the owner has, by what paths call it."""


@pytest.mark.parametrize(("method", "path"), [one for one in routes() if parameters(one[1]) and one[1] not in NOBODYS])
def test_anothers_is_not_there(site: Site, method: str, path: str) -> None:
    names = parameters(path)
    assert set(names) <= set(THINGS), f"say above what a {names} is, and how a key comes to have one"
    who, things = ("operator", {"id": make_job}) if path in OF_COMMANDS else ("owner", THINGS)
    owners, nobodys = filled(path, lambda name: things[name](site)), filled(path, lambda name: "nobody")
    assert site.ask(method, owners, None).status_code == 401
    other, missing = site.ask(method, owners, "other"), site.ask(method, nobodys, "other")
    if path.startswith("/v1/adapters") and method != "GET":
        assert (other.status_code, missing.status_code) == (403, 403)  # operators only, whatever is there
        return
    assert (other.status_code, missing.status_code) == (404, 404)
    # Nothing tells what is another's from what is nobody's.
    assert said(other, owners) == said(missing, nobodys)
    owner = site.ask(method, owners, who)
    assert owner.status_code not in (401, 403)
    assert owner.status_code != 404 or said(owner, owners) != said(missing, nobodys)


def said(answer: httpx2.Response, path: str) -> str:
    """What an answer says, whatever it was asked about."""
    words = answer.text
    for part in path.split("/")[2:]:
        words = words.replace(part, "...")
    return words


@pytest.mark.parametrize(("method", "path"), [one for one in routes() if one[1] not in FREE])
def test_without_a_key_there_is_nothing(site: Site, method: str, path: str) -> None:
    path = filled(path, lambda name: "anything")
    if (method, path) == ("POST", "/login"):
        return  # where a key is given
    assert site.ask(method, path, None).status_code == 401
    wrong = {"authorization": "Bearer lm-" + "x" * 43}
    assert httpx2.request(method, f"{site.server.url}{path}", headers=wrong, timeout=60).status_code == 401


@pytest.mark.parametrize("path", sorted(FREE))
def test_health_needs_no_key(site: Site, path: str) -> None:
    assert site.ask("GET", path, None).status_code == 200


def test_nothing_else_answers_without_a_key(site: Site) -> None:
    for path in ("/openapi.json", "/docs", "/redoc", "/static/page.css", "/v1", "/v1/nothing", "/nothing"):
        assert site.ask("GET", path, None).status_code == 401, path


def test_lists_have_only_what_is_the_askers(site: Site) -> None:
    file, batch = make_file(site), make_batch(site)
    with site.client("owner") as owner, site.client("other") as other, site.client("operator") as operator:
        assert file in [one.id for one in owner.files.list()]
        assert batch in [one.id for one in owner.batches.list()]
        for stranger in (other, operator):
            assert list(stranger.files.list()) == []
            assert list(stranger.batches.list()) == []
            for lists, after in ((stranger.files.list, file), (stranger.batches.list, batch)):
                with pytest.raises(openai.NotFoundError):
                    lists(after=after)
            with pytest.raises(openai.NotFoundError):
                stranger.batches.create(input_file_id=file, endpoint="/v1/completions", completion_window="24h")
        assert [model.id for model in other.models.list()] == ["stub", "a01"]
        assert "a00" in [model.id for model in owner.models.list()]


def test_anothers_adapter_answers_nothing(site: Site) -> None:
    with site.client("other") as client:
        assert client.completions.create(model="a01", prompt="x").choices[0].text == "ok:x"
        for model in ("a00", "stub:a00"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.completions.create(model=model, prompt="x")
            assert caught.value.code == "model_not_found"
        row = json.loads(FILE[1])
        row["body"]["model"] = "a00"
        file = client.files.create(file=(FILE[0], json.dumps(row).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        until(lambda: client.batches.retrieve(batch.id).status == "failed", 90)
        errors = client.batches.retrieve(batch.id).errors
        assert errors is not None and errors.data is not None
        assert [error.code for error in errors.data] == ["model_not_found"]
