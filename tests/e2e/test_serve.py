"""`loramill serve` as its operator meets it: how it starts, what it refuses, and every way in which it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from loramill.producer.api.keys import Key, hash_of, new_token, write_keys
from loramill.producer.cli import main
from loramill.schemas.failures import ExitCode
from tests.servers import RedisServer
from tests.serving import MAIN, STUB, Server
from tests.worker.queueing import ENVIRONMENT, until

PATIENCE_S = 90.0


def lives(pid: int) -> bool:
    """A process that has ended, and waits for somebody to ask how, does not."""
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def offspring(pid: int) -> list[int]:
    """The processes that it started, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(stat.parent.name)
            found += [child, *offspring(child)]
    return found


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.api, api_key="any", max_retries=0, timeout=PATIENCE_S)


def ask(server: Server, prompt: str = "hello") -> str:
    with client_of(server) as client:
        return client.completions.create(model="a01", prompt=prompt).choices[0].text


def signalled(server: Server, number: int) -> None:
    assert server.process is not None
    server.process.send_signal(number)


def ended(server: Server) -> int:
    assert server.process is not None
    return server.process.wait(PATIENCE_S)


def test_one_command_and_everything_works(tmp_path: Path) -> None:
    with Server(tmp_path, *STUB) as server:
        server.ready()
        assert server.process is not None
        family = offspring(server.process.pid)
        assert len(family) == 2  # the worker and its engine
        assert ask(server) == "ok:hello"
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "tokenizers" in maps
        assert "libtorch" not in maps, "of its 330 MB a server needs none"
        assert (tmp_path / "loramill.db").exists()
        assert f"listening on http://127.0.0.1:{server.port}\n" in server.log
        assert server.stop() == ExitCode.OK
        assert not any(map(lives, family))
        assert re.search(r"^worker: .* finishing the rows that run", server.log, re.MULTILINE)
        assert "hello" not in server.log


def test_a_free_port(tmp_path: Path) -> None:
    line = [sys.executable, "-c", MAIN, "serve", "--store", "sqlite:///s.db", "--port", "0"]
    process = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    try:
        assert process.stderr is not None
        found = re.search(r"listening on (http://127\.0\.0\.1:[1-9]\d*)$", process.stderr.readline().strip())
        assert found
        assert httpx2.get(f"{found[1]}/healthz", timeout=PATIENCE_S).status_code == 200
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, "Traceback" in rest) == (ExitCode.OK, False)
    finally:
        process.kill()
        process.communicate()


def test_a_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    with Server(tmp_path, *STUB, "--lease", "2") as server:
        server.ready()
        assert server.process is not None
        worker = offspring(server.process.pid)[0]
        os.kill(worker, signal.SIGKILL)
        until(lambda: f"ended with code {-signal.SIGKILL}; it is started again in 1 s" in server.log, PATIENCE_S)
        assert httpx2.get(f"{server.url}/healthz", timeout=PATIENCE_S).status_code == 200
        until(lambda: server.log.count("ready\n") == 2, PATIENCE_S)
        assert ask(server) == "ok:hello"


def test_a_server_that_is_killed_takes_its_worker_with_it(tmp_path: Path) -> None:
    with Server(tmp_path, *STUB) as server:
        server.ready()
        assert server.process is not None
        family = offspring(server.process.pid)
        assert len(family) == 2
        server.kill()
        until(lambda: not any(map(lives, family)), PATIENCE_S)


def test_a_worker_that_can_never_start_ends_the_server_as_it_ended(tmp_path: Path) -> None:
    line = [sys.executable, "-c", MAIN, "serve", "--port", "0", "--embedded", "--base-model", "./nothing"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, env=os.environ)
    assert done.returncode == ExitCode.INPUT
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: --base-model ./nothing") and done.stderr.count(last) > 1
    assert "Traceback" not in done.stderr


FILE = ("--store", "sqlite:///s.db", "--port", "0")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--port", "0"), ExitCode.USAGE, "no store is given"),
        (("--store", "nothing:/x", "--port", "0"), ExitCode.USAGE, "is no store's URL"),
        (("--store", "sqlite:///no.db", "--port", "0"), ExitCode.MACHINE, "no.db"),
        (("--store", "redis://127.0.0.1:1/0", "--port", "0"), ExitCode.MACHINE, "127.0.0.1:1"),
        ((*FILE, "--port", "TAKEN"), ExitCode.MACHINE, "cannot listen on 127.0.0.1, port"),
        ((*FILE, "--port", "70000"), ExitCode.USAGE, "70000 is not in the range"),
        ((*FILE, "--host", "no.such.host.invalid"), ExitCode.USAGE, "is no address"),
        ((*FILE, "--host", "192.0.2.1", "--keys", "k.toml"), ExitCode.USAGE, "not an address of this machine"),
        ((*FILE, "--host", "0.0.0.0"), ExitCode.USAGE, "there are no keys"),
        ((*FILE, "--host", "::"), ExitCode.USAGE, "there are no keys"),
        ((*FILE, "--keys", "broken.toml"), ExitCode.INPUT, "broken.toml"),
        ((*FILE, "--keys", "k.toml", "--webhook-url", "https://x"), ExitCode.USAGE, "each key has its own webhook"),
        ((*FILE, "--webhook-url", "https://x"), ExitCode.USAGE, "--webhook-secret-file"),
        ((*FILE, "--base-model", "m"), ExitCode.USAGE, "--base-model is for a worker"),
        (("--embedded",), ExitCode.USAGE, "needs --base-model"),
        (("--embedded", "--base-model", "m", "--store", "redis://x"), ExitCode.USAGE, "`loramill worker`"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
    code: ExitCode, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAMILL_STORE", raising=False)
    Path("broken.toml").write_text("no toml [")
    Path("no.db").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        port = str(taken.getsockname()[1])
        main(["serve", *(port if part == "TAKEN" else part for part in arguments)])
    assert ended.value.code == code
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("Error: ") and said in last


def test_what_runs_is_finished_and_what_watches_is_let_go(tmp_path: Path) -> None:
    with Server(tmp_path, *STUB, "--store", f"sqlite:///{tmp_path}/s.db") as server:
        server.ready()
        said: list[str] = []
        asking = threading.Thread(target=lambda: said.append(ask(server, "SLOW")))
        asking.start()
        with client_of(server) as client, httpx2.Client(base_url=server.url, timeout=PATIENCE_S) as watching:
            row = b'{"custom_id":"1","method":"POST","url":"/v1/completions","body":{"model":"a01","prompt":"SLOW"}}\n'
            file = client.files.create(file=("in.jsonl", row), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            with watching.stream("GET", f"/v1/batches/{batch.id}/events") as events:
                lines = events.iter_lines()
                assert next(lines)
                signalled(server, signal.SIGTERM)
                for _ in lines:
                    pass
        asking.join(PATIENCE_S)
        assert said == ["ok:SLOW"]
        assert ended(server) == ExitCode.OK
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/healthz")


@contextmanager
def uploading(server: Server) -> Iterator[socket.socket]:
    """A connection by which a file comes that never ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as made:
        head = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        made.sendall(f"{head}content-length: 1000\r\nexpect: 100-continue\r\n\r\n".encode())
        assert b"100 Continue" in made.recv(1000)
        made.sendall(b"--b\r\n")
        yield made


def test_what_does_not_end_is_ended(tmp_path: Path) -> None:
    soon = "import loramill.producer.api.server as server; server.FINISH_S = 1"
    with Server(tmp_path, "--store", f"sqlite:///{tmp_path}/s.db", before=soon) as server, uploading(server) as made:
        signalled(server, signal.SIGTERM)
        said = b"".join(iter(lambda: made.recv(10_000), b""))
        assert said.startswith(b"HTTP/1.1 503 ") and b'"code":"server_ends"' in said
        assert ended(server) == ExitCode.OK


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with Server(tmp_path, *STUB) as server, uploading(server):
        server.ready()
        assert server.process is not None
        family = offspring(server.process.pid)
        signalled(server, signal.SIGTERM)
        until(lambda: "once more to stop at once" in server.log, PATIENCE_S)
        signalled(server, signal.SIGINT)
        assert ended(server) == ExitCode.INTERRUPTED
        until(lambda: not any(map(lives, family)), PATIENCE_S)


def test_servers_of_one_store_share_who_is_signed_in(tmp_path: Path, redis_server: RedisServer) -> None:
    token, keys = new_token(), tmp_path / "keys.toml"
    write_keys(keys, {"ann": Key(sha256=hash_of(token))})
    given = ("--store", redis_server.url, "--store-prefix", uuid.uuid4().hex, "--keys", keys)
    with Server(tmp_path / "one", *given) as one, Server(tmp_path / "two", *given) as two:
        form = {"content-type": "application/x-www-form-urlencoded"}
        answer = httpx2.post(f"{one.url}/login", content=f"key={token}", headers=form, timeout=PATIENCE_S)
        cookie = {"cookie": answer.headers["set-cookie"].partition(";")[0]}
        for server in (one, two):
            assert httpx2.get(f"{server.url}/v1/files", headers=cookie, timeout=PATIENCE_S).status_code == 200
            assert httpx2.get(f"{server.url}/v1/files", timeout=PATIENCE_S).status_code == 401
        assert token not in one.log + two.log
        # A key that is taken away is nobody's from then on, and neither are its sessions.
        write_keys(keys, {})
        for server in (one, two):
            url = f"{server.url}/v1/files"
            until(lambda url=url: httpx2.get(url, headers=cookie, timeout=PATIENCE_S).status_code == 401, PATIENCE_S)  # type: ignore[misc]
