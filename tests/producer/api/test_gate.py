"""The gate, by a real server over a real store, and by sockets where a client would be too well-behaved."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from fastapi.routing import iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st

from loramill.producer.api import bodies, connection, gate
from loramill.producer.api.app import make_app
from loramill.producer.api.bodies import MAX_DEPTH, nested_over
from loramill.producer.api.context import Api, Caller, Limits, Quota
from loramill.producer.api.keys import Key, Keys, hash_of, new_token, write_keys
from loramill.producer.api.rates import Rates
from loramill.producer.api.server import config_of
from loramill.producer.api.session import COOKIE, LIFE_S
from loramill.store.errors import StoreUnreachable
from loramill.store.sqlite_store import SqliteStore

DEADLINE_S = 60.0
FORM = {"content-type": "application/x-www-form-urlencoded"}


class Live:
    """A server in a thread, as `loramill serve` has it."""

    def __init__(self, api: Api, tokens: dict[str, str], hosts: set[str] | None = None) -> None:
        self.api, self.tokens = api, tokens
        self.app = make_app(api, hosts)
        config = config_of(self.app)
        config.port = 0
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        give_up = time.monotonic() + DEADLINE_S
        while not self.server.started:
            assert self._thread.is_alive() and time.monotonic() < give_up
            time.sleep(0.01)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._client = httpx2.Client(timeout=DEADLINE_S)

    def ask(self, method: str, path: str, key: str | None = None, **more: Any) -> httpx2.Response:
        """By one of the keys."""
        headers = {**({"authorization": f"Bearer {self.tokens[key]}"} if key else {}), **more.pop("headers", {})}
        try:
            return self._client.request(method, self.url + path, headers=headers, **more)
        finally:
            self._client.cookies.clear()  # each request has what the test gives it

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        """A bare connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S) as made:
            yield made

    def close(self) -> None:
        self._client.close()
        self.server.should_exit = True
        self._thread.join(DEADLINE_S)
        self.api.store.close()


def said(response: httpx2.Response) -> tuple[int, str]:
    """Its status and its error's code, which stands where OpenAI's clients look for it."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return response.status_code, error["code"]


def heard(connection: socket.socket) -> tuple[int, dict[str, Any], bytes]:
    """All that comes until the connection is closed: status, error, and the head as it was sent."""
    whole = b""
    while data := connection.recv(65536):
        whole += data
    head, _, body = whole.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"], head.lower()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with keys."""
    folder = tmp_path_factory.mktemp("closed")
    tokens = {name: new_token() for name in ("ann", "bob", "slow", "op")}
    made = {name: Key(sha256=hash_of(token), operator=name == "op") for name, token in tokens.items()}
    made["slow"] = Key(sha256=hash_of(tokens["slow"]), requests_per_minute=3)
    write_keys(folder / "keys.toml", made)
    live = Live(Api(SqliteStore(folder / "s.db"), Keys(folder / "keys.toml"), Limits(body_bytes=20_000)), tokens)
    yield live
    live.close()


@pytest.fixture(scope="module")
def open_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server without keys."""
    store = SqliteStore(tmp_path_factory.mktemp("open") / "s.db")
    live = Live(Api(store, Keys(), Limits(body_bytes=20_000)), {}, {"127.0.0.1", "localhost", "[::1]"})
    yield live
    live.close()


def routes(live: Live) -> list[tuple[str, str]]:
    """Every method and path that the application knows, with something for each parameter."""
    found = []
    for route in iter_route_contexts(live.app.routes):
        path = route.path
        assert path is not None
        while "{" in path:
            path = path[: path.index("{")] + "x" + path[path.index("}") + 1 :]
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


def test_no_route_but_health_answers_without_a_key(closed: Live) -> None:
    known = routes(closed)
    assert ("POST", "/v1/files") in known and ("GET", "/openapi.json") in known and ("GET", "/metrics") in known
    for method, path in [
        *known,
        ("GET", "/v1/nothing"),
        ("GET", "/docs"),
        ("PATCH", "/v1/files"),
        ("GET", "/healthz/"),
    ]:
        if path in gate.FREE or (method, path) == ("POST", "/login"):
            continue
        for headers in ({}, {"authorization": "Bearer lm-wrong"}, {"authorization": "Basic eDp5"}, {"cookie": "a=b"}):
            answer = closed.ask(method, path, headers=headers)
            assert answer.status_code == 401, (method, path)
            if path not in ("/", "/login") and method != "HEAD":
                assert said(answer) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"


def test_health_answers_without_a_key(closed: Live) -> None:
    assert closed.ask("GET", "/healthz").json() == {"status": "ok"}
    assert closed.ask("GET", "/readyz").json() == {"status": "ready", "store": "ok", "workers": 0}


def test_openais_client_is_told_apart(closed: Live) -> None:
    with openai.OpenAI(base_url=f"{closed.url}/v1", api_key="lm-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.files.list()
        assert refused.value.code == "invalid_api_key" and refused.value.request_id
    with openai.OpenAI(base_url=f"{closed.url}/v1", api_key=closed.tokens["ann"]) as client:
        assert client.files.list().data == []


def test_every_answer_has_an_id_and_what_keeps_browsers_calm(closed: Live) -> None:
    own = closed.ask("GET", "/v1/files", "ann", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    for answer in (
        own,
        closed.ask("GET", "/v1/files"),
        closed.ask("GET", "/v1/nothing", "ann", headers={"x-request-id": "a b"}),
        closed.ask("GET", "/healthz", headers={"x-request-id": "x" * 200}),
    ):
        assert answer.headers["x-request-id"] == "mine-1" or answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers and "server" not in answer.headers
    assert own.headers["cache-control"] == "no-store"
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in closed.ask("OPTIONS", "/v1/files", "ann", headers=preflight).headers


def test_a_key_may_ask_so_often(closed: Live) -> None:
    answers = [closed.ask("GET", "/v1/files", "slow") for _ in range(4)]
    assert [one.status_code for one in answers] == [200, 200, 200, 429]
    assert [one.headers["x-ratelimit-remaining-requests"] for one in answers] == ["2", "1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert said(answers[3]) == (429, "rate_limit_exceeded")
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20
    assert closed.ask("GET", "/v1/files", "ann").status_code == 200


@pytest.mark.parametrize("how", ["said", "came"])
def test_a_body_that_is_too_large_is_not_read_to_its_end(open_: Live, how: str) -> None:
    head = b"POST /v1/batches HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with open_.connected() as connection:
        if how == "said":
            connection.sendall(head + b"content-length: 900000000\r\n\r\n{")
        else:
            connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n")
            for _ in range(4):
                connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        connection.shutdown(socket.SHUT_WR)
        status, error, sent = heard(connection)
    assert (status, error["code"], error["type"]) == (413, "too_large", "invalid_request_error")
    assert b"connection: close" in sent


def test_a_body_of_the_most_bytes_is_read(open_: Live) -> None:
    assert open_.ask("POST", "/v1/batches", content=b" " * 20_000).status_code in (400, 422)
    assert said(open_.ask("POST", "/v1/batches", content=b" " * 20_001)) == (413, "too_large")


def test_a_body_that_is_nested_too_deeply(open_: Live) -> None:
    headers = {"content-type": "application/json"}
    for depth in (MAX_DEPTH + 1, 9_000):
        body = b"[" * depth + b"]" * depth
        for path in ("/v1/batches", "/v1/chat/completions", "/v1/uploads"):
            assert said(open_.ask("POST", path, content=body, headers=headers)) == (400, "too_deep")


@given(st.recursive(st.none() | st.text(alphabet='[]{}"\\a'), lambda inner: st.lists(inner, max_size=3), max_leaves=20))
def test_how_deeply_json_is_nested(value: Any) -> None:
    def depth(of: Any) -> int:
        return 1 + max(map(depth, of), default=0) if isinstance(of, list) else 0

    body = json.dumps(value).encode()
    assert nested_over(body, depth(value)) is False
    assert depth(value) == 0 or nested_over(body, depth(value) - 1) is True


@given(st.binary(max_size=200))
def test_any_bytes_can_be_looked_at(body: bytes) -> None:
    assert nested_over(body, 200) is False


def test_too_many_headers(open_: Live) -> None:
    many = {f"x-{number}": "1" for number in range(gate.MAX_HEADERS)}
    assert said(open_.ask("GET", "/v1/files", headers=many)) == (431, "too_many_headers")


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", b"no http at all\r\n\r\n"])
def test_what_cannot_be_read_is_said_in_our_shape(open_: Live, sent: bytes) -> None:
    with open_.connected() as connection:
        connection.sendall(sent)
        status, error, _ = heard(connection)
    assert (status, error["code"]) == (400, "invalid_http")


def test_nobody_is_waited_for_for_ever(open_: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.2)
    monkeypatch.setattr(bodies, "BODY_S", 0.2)
    healthy = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for before, beginning in ((b"", b""), (b"", healthy[:12]), (healthy, b"G")):
        with open_.connected() as made:
            made.sendall(before)
            answer = b""
            while before and not answer.endswith(b'{"status":"ok"}'):
                answer += made.recv(65536)
            made.sendall(beginning)
            assert made.recv(65536) == b""
    head = b"POST /v1/batches HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{"
    monkeypatch.setattr(bodies, "DRAIN_S", 0.2)
    with open_.connected() as made:
        made.sendall(head)
        status, error, _ = heard(made)
    assert (status, error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "localhost.", "[::2]"]
)
def test_a_server_without_keys_answers_to_its_own_names_only(open_: Live, host: str) -> None:
    assert said(open_.ask("GET", "/v1/files", headers={"host": host})) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "LocalHost:8000", "[::1]:8000"])
def test_its_own_names(open_: Live, host: str) -> None:
    assert open_.ask("GET", "/v1/files", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"origin": "http://localhost"}, True),
        ({"origin": "http://localhost:1"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "https://evil.example", "sec-fetch-site": "same-origin"}, True),
    ],
)
def test_other_sites_pages_change_nothing_on_a_server_without_keys(
    open_: Live, headers: dict[str, str], passes: bool
) -> None:
    answer = open_.ask("POST", "/v1/batches/b/cancel", headers={"host": "localhost", **headers})
    assert said(answer)[1] == ("batch_not_found" if passes else "cross_site_request")
    assert open_.ask("GET", "/v1/files", headers={"host": "localhost", **headers}).status_code == 200


def signed_in(closed: Live, name: str) -> str:
    """The session's cookie."""
    answer = closed.ask("POST", "/login", content=f"key={closed.tokens[name]}", headers=FORM)
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie: str = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={LIFE_S}"} <= set(cookie.split("; "))
    return cookie.partition(";")[0]


def test_signing_in(closed: Live) -> None:
    for path in ("/", "/login"):
        form = closed.ask("GET", path)
        assert form.status_code == 401 and 'action="/login"' in form.text
    refused = closed.ask("POST", "/login", content="key=lm-wrong", headers=FORM)
    assert refused.status_code == 401 and "set-cookie" not in refused.headers and "lm-wrong" not in refused.text
    cookie = {"cookie": signed_in(closed, "ann")}
    assert closed.ask("GET", "/", headers=cookie).status_code == 200
    assert closed.ask("GET", "/v1/files", headers=cookie).status_code == 200
    assert closed.ask("GET", "/login", headers=cookie).headers["location"] == "/"
    out = closed.ask("POST", "/logout", headers={**cookie, "sec-fetch-site": "same-origin"})
    assert out.status_code == 303 and f'{COOKIE}=""' in out.headers["set-cookie"]


def test_a_cookie_changes_nothing_unless_it_is_known_whence(closed: Live) -> None:
    cookie = {"cookie": signed_in(closed, "ann")}
    for headers in ({}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        answer = closed.ask("POST", "/v1/batches/b/cancel", headers={**cookie, **headers})
        assert said(answer) == (403, "cross_site_request")
    for headers in ({"origin": closed.url}, {"sec-fetch-site": "same-origin"}):
        answer = closed.ask("POST", "/v1/batches/b/cancel", headers={**cookie, **headers})
        assert said(answer) == (404, "batch_not_found")


def test_a_cookie_is_good_for_its_own_key_and_time(closed: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    cookie = signed_in(closed, "ann")
    name, _, value = cookie.partition("=")
    user, until, signature = value.split(".")
    forged = [
        f"bob.{until}.{signature}", f"op.{until}.{signature}", f"{user}.{int(until) + 1}.{signature}",
        f"{user}.{until}.", f"{user}.{until}.{signature[:-1]}", signature, "", f"nobody.{until}.{signature}",
        f"{user}.{'9' * 5000}.{signature}", f"{user}.-1.{signature}", f"{user}.{until}.ä",
    ]  # fmt: skip
    for one in forged:
        assert closed.ask("GET", "/v1/files", headers={"cookie": f"{name}={one}".encode()}).status_code == 401  # type: ignore[dict-item]
    assert closed.ask("GET", "/v1/files", headers={"cookie": cookie}).status_code == 200
    monkeypatch.setattr("loramill.producer.api.session.time.time", lambda: int(until) + 1.0)
    assert closed.ask("GET", "/v1/files", headers={"cookie": cookie}).status_code == 401


def test_a_token_is_who_asks_whatever_cookie_comes_with_it(closed: Live) -> None:
    cookie = signed_in(closed, "op")
    wrong = {"cookie": cookie, "authorization": "Bearer lm-wrong"}
    assert closed.ask("GET", "/v1/files", headers=wrong).status_code == 401


def test_only_operators_see_the_metrics(closed: Live) -> None:
    assert said(closed.ask("GET", "/metrics", "ann")) == (403, "operators_only")
    answer = closed.ask("GET", "/metrics", "op")
    assert answer.status_code == 200
    assert 'loramill_http_requests_total{method="GET",route="unmatched",status="401"}' in answer.text


def test_a_store_that_is_away_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> list[Any]:
        raise StoreUnreachable("nobody answers")

    live = Live(Api(SqliteStore(tmp_path / "s.db"), Keys()), {})
    try:
        monkeypatch.setattr(live.api.store, "workers", away)
        answer = live.ask("GET", "/readyz")
        assert said(answer) == (503, "store_unreachable")
        assert live.ask("GET", "/healthz").status_code == 200
    finally:
        live.close()


def test_what_is_written_down(closed: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "loramill.access")
    closed.ask("GET", "/v1/files?after=secret", "ann", headers={"x-request-id": "r1"})
    closed.ask("POST", "/v1/nothing/secret", "bob", headers={"x-request-id": "r2"}, content=b"secret")
    closed.ask("GET", "/v1/batches/secret", headers={"x-request-id": "r3", "authorization": "Bearer secret"})
    closed.ask("GET", "/healthz")
    give_up = time.monotonic() + DEADLINE_S
    while len(caplog.messages) < 3:  # after the answer has gone
        assert time.monotonic() < give_up
        time.sleep(0.01)
    lines = sorted(caplog.messages)
    assert len(lines) == 3
    assert [line.split(" ")[:4] for line in lines] == [
        ["r1", "GET", "/v1/files", "400" if "400" in lines[0] else "404"], ["r2", "POST", "-", "404"],
        ["r3", "GET", "-", "401"],
    ]  # fmt: skip
    assert [line.rpartition("=")[2] for line in lines] == ["ann", "bob", "-"]
    assert not any("secret" in line for line in lines)


def test_what_nobody_foresaw_says_where_and_nothing_of_the_request(
    closed: Live, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise ValueError("secret")

    closed.app.add_api_route("/v1/fails", fails)
    answer = closed.ask("GET", "/v1/fails", "ann")
    assert said(answer) == (500, "internal_error") and answer.headers["x-request-id"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "ValueError" in record.message and "in fails" in record.message
    assert "secret" not in record.getMessage().replace('raise ValueError("secret")', "")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_rates() -> None:
    clock = Clock()
    rates = Rates(clock)
    assert [rates.take("a", 60).remaining for _ in range(60)] == [*range(59, -1, -1)]
    refused = rates.take("a", 60)
    assert (refused.retry_s, refused.remaining, refused.reset_s) == (1.0, 0, 60.0)
    assert refused.headers["retry-after"] == "1"
    assert rates.take("b", 60).retry_s == 0
    clock.now_s = 1.0
    assert rates.take("a", 60).retry_s == 0
    assert rates.take("a", 60).retry_s == 1.0
    clock.now_s = 1e6
    assert rates.take("a", 60).remaining == 59


@given(st.lists(st.floats(0, 10), max_size=200), st.integers(1, 100))
def test_no_more_than_the_rate_passes(pauses: list[float], per_minute: int) -> None:
    clock = Clock()
    rates, passed = Rates(clock), 0
    for pause in pauses:
        clock.now_s += pause
        passed += rates.take("a", per_minute).retry_s == 0
    assert passed <= per_minute + clock.now_s * per_minute / 60 + 1e-6
    assert passed >= min(len(pauses), per_minute)


def test_quotas_of_a_key_are_the_callers() -> None:
    key = Key(sha256="0" * 64, adapters=["sql-*"], stored_bytes=1, open_batches=2, pending_rows=3, questions=4)
    assert key.caller("ann") == Caller("ann", False, ("sql-*",), Quota(1, 2, 3, questions=4))
