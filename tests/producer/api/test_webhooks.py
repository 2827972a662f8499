"""What is sent when batches end, taken by a real server and unwrapped by the official client."""

from __future__ import annotations

import base64
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from loramill.producer.api import webhook_post
from loramill.producer.api.context import Api
from loramill.producer.api.keys import Keys
from loramill.producer.api.webhook_post import Endpoint, Refused, choose, is_public, post
from loramill.producer.api.webhooks import Pace, Webhooks
from loramill.store.contract import JobStore
from tests.producer.api.batch_server import FAST, Served, chats, serving, until
from tests.producer.served_by_stub import Place

SECRET = "whsec_" + base64.b64encode(b"a secret of enough bytes").decode()
QUICK = Pace(look_s=0.05, again_s=(0.1, 0.1, 0.1))


@dataclass
class Receiver:
    """Keeps what is posted to it, and answers as it is told."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


@contextmanager
def receiving() -> Iterator[Receiver]:
    mine = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            mine.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(mine.statuses.pop(0) if mine.statuses else 204)
            self.send_header("location", f"{mine.url}/elsewhere")
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        mine.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield mine
        server.shutdown()
        thread.join()


@contextmanager
def telling(
    store: JobStore, endpoint_of: Callable[[str], Endpoint | None], *, private: bool = True, pace: Pace = QUICK
) -> Iterator[tuple[Served, Webhooks]]:
    """A server whose minder tells of ends."""
    webhooks = Webhooks(Api(store, Keys(None), name="teller"), endpoint_of, allow_private=private, pace=pace)
    webhooks.start()
    try:
        with serving(store, on_end=webhooks.owe, pace=FAST) as server:
            yield server, webhooks
    finally:
        webhooks.close()


def owed(store: JobStore) -> int:
    return len(store.shelf.records("webhook"))


def test_the_official_client_unwraps_what_is_sent(place: Place, receiver: Receiver) -> None:
    with telling(place.store, lambda owner: Endpoint(f"{receiver.url}/hook?x=1", SECRET)) as (server, _):
        done, failed = server.work(server.create(chats(2)).id), server.see(server.create(["{"]).id)
        cancelled = server.create(chats(3))
        server.client().batches.cancel(cancelled.id)
        server.see(cancelled.id)
        until(lambda: len(receiver.got), lambda count: count == 3)
        until(lambda: owed(place.store), lambda left: left == 0)
    with openai.OpenAI(api_key="x", webhook_secret=SECRET) as client:
        events = [client.webhooks.unwrap(body, headers) for headers, body in receiver.got]
        said: list[Any] = [(event.type, event.data.id) for event in events]  # type: ignore[union-attr]
        assert sorted(said) == sorted(
            [("batch.completed", done.id), ("batch.failed", failed.id), ("batch.cancelled", cancelled.id)]
        )
        assert len({event.id for event in events}) == 3  # type: ignore[union-attr]
        headers, body = receiver.got[0]
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + b" ", headers)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, headers, secret="whsec_" + base64.b64encode(b"x" * 24).decode())
    assert headers["webhook-id"].startswith("evt_") and headers["content-type"] == "application/json"


def test_what_nobody_took_is_sent_again(place: Place, receiver: Receiver) -> None:
    receiver.statuses = [500, 302]
    with telling(place.store, lambda owner: Endpoint(receiver.url, SECRET)) as (server, _):
        server.work(server.create(chats(1)).id)
        until(lambda: len(receiver.got), lambda count: count == 3)
        until(lambda: owed(place.store), lambda left: left == 0)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({body for _, body in receiver.got}) == 1


def test_what_nobody_takes_is_given_up(place: Place, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.statuses = [500] * 9
    with telling(place.store, lambda owner: Endpoint(receiver.url, SECRET)) as (server, _):
        server.work(server.create(chats(1)).id)
        until(lambda: "given up after 4 tries: HTTP 500" in caplog.text)
        assert owed(place.store) == 0
    assert len(receiver.got) == 4 and SECRET not in caplog.text and receiver.url not in caplog.text


def test_nobody_is_told_who_did_not_ask(place: Place, receiver: Receiver) -> None:
    with telling(place.store, lambda owner: None) as (server, _):
        server.work(server.create(chats(1)).id)
        assert owed(place.store) == 0
    assert receiver.got == []


def test_private_networks_are_not_reached(place: Place, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "loramill.api")
    secure = receiver.url.replace("http:", "https:")
    with telling(place.store, lambda owner: Endpoint(secure, SECRET), private=False) as (server, _):
        server.work(server.create(chats(1)).id)
        until(lambda: "the receiver is in a private network" in caplog.text)
    with pytest.raises(Refused, match="https alone"):
        post(Endpoint(receiver.url, SECRET), "evt_1", b"{}", allow_private=False)
    assert receiver.got == []


def test_the_address_that_was_looked_at_is_the_one_connected_to(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads to another address each time it is asked for leads nowhere new."""
    asked = list[str]()
    real = socket.getaddrinfo
    answers = iter(["127.0.0.1", "127.0.0.9"])

    def getaddrinfo(host: Any, port: Any, *given: Any, **named: Any) -> Any:
        if host == "moves.test":
            asked.append(host)
            return real(next(answers), port, *given, **named)
        return real(host, port, *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    url = receiver.url.replace("127.0.0.1", "moves.test")
    assert post(Endpoint(f"{url}/hook", SECRET), "evt_1", b"{}", allow_private=True) == 204
    assert asked == ["moves.test"]
    assert receiver.got[0][0]["host"] == url.removeprefix("http://")


def test_the_name_and_not_the_address_is_asked_for_its_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Any]()

    class Client:
        def __init__(self, **settings: Any) -> None:
            seen.append(settings)

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *error: object) -> None: ...

        @contextmanager
        def stream(self, method: str, url: Any, **given: Any) -> Iterator[Any]:
            seen.append((str(url), given["extensions"], given["headers"]["host"]))
            yield type("Answer", (), {"status_code": 200})

    monkeypatch.setattr(webhook_post.httpx2, "Client", Client)
    public = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2606:4700::1111", 443, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: public)
    assert post(Endpoint("https://hooks.example/x", SECRET), "evt_1", b"{}", allow_private=False) == 200
    settings, sent = seen
    assert (settings["trust_env"], settings["follow_redirects"]) == (False, False)
    assert sent == ("https://[2606:4700::1111]/x", {"sni_hostname": "hooks.example"}, "hooks.example")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
        "2002:7f00:1::", "64:ff9b::a9fe:a9fe", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(Refused):
        choose(["1.1.1.1", address], allow_private=False)
    assert choose([address], allow_private=True) == ipaddress.ip_address(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_addresses_that_are_public(address: str) -> None:
    assert choose([address], allow_private=False) == ipaddress.ip_address(address)


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("ftp://x.test/", SECRET), ("https:///x", SECRET), ("https://me:pw@x.test/", SECRET),
        ("http://x:port/", SECRET), ("https://x.test/", "secret"), ("https://x.test/", "whsec_!"),
        ("https://x.test/", "whsec_c2hvcnQ="),
    ],
)  # fmt: skip
def test_endpoints_that_cannot_be(url: str, secret: str) -> None:
    with pytest.raises(ValueError, match="webhook"):
        Endpoint(url, secret)


def test_one_who_takes_his_time_holds_up_nobody_else(tmp_path: Path, receiver: Receiver) -> None:
    place, stuck = Place(tmp_path), socket.create_server(("127.0.0.1", 0))
    slow = f"http://127.0.0.1:{stuck.getsockname()[1]}/"
    webhooks = Webhooks(
        Api(place.store, Keys(None), name="teller"),
        lambda owner: Endpoint(slow if owner == "slow" else receiver.url, SECRET), allow_private=True, pace=QUICK,
    )  # fmt: skip
    for at in range(20):
        owner = "slow" if at < 10 else "quick"
        place.store.shelf.put(
            "webhook", f"evt_{at}", owner, b'{"type":"batch.completed","batch":"b","at_ms":1,"tries":0,"due_s":0}'
        )
    webhooks.start()
    until(lambda: len(receiver.got), lambda count: count == 10)
    stuck.close()
    webhooks.close()
