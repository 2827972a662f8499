"""The bad network does what it says."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(4096):
                    connection.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy(echo) as made:
        yield made


def _connect(proxy: Proxy, timeout_s: float = 0.3) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout_s)


def test_bytes_pass_both_ways(proxy: Proxy) -> None:
    with _connect(proxy) as line:
        for _ in range(3):
            line.sendall(b"x" * 1000)
            assert line.recv(1000, socket.MSG_WAITALL) == b"x" * 1000


def test_a_partition_withholds_what_is_sent_and_it_arrives_late(proxy: Proxy) -> None:
    with _connect(proxy) as old:
        old.sendall(b"a")
        assert old.recv(1) == b"a"
        proxy.partition()
        old.sendall(b"b")
        with _connect(proxy) as new:  # it is taken, and hears nothing
            new.sendall(b"c")
            for line in (old, new):
                with pytest.raises(TimeoutError):
                    line.recv(1)
            proxy.heal()
            assert old.recv(1) == b"b"
            assert new.recv(1) == b"c"


def test_what_a_router_forgot_stays_mute(proxy: Proxy) -> None:
    with _connect(proxy) as old:
        old.sendall(b"a")
        assert old.recv(1) == b"a"
        proxy.partition(lose=True)
        proxy.heal()
        old.sendall(b"b")
        with pytest.raises(TimeoutError):
            old.recv(1)
        with _connect(proxy) as new:
            new.sendall(b"c")
            assert new.recv(1) == b"c"


def test_a_reset_is_one(proxy: Proxy) -> None:
    with _connect(proxy) as line:
        line.sendall(b"a")
        assert line.recv(1) == b"a"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            line.recv(1)


def test_a_delay_is_one(proxy: Proxy) -> None:
    proxy.delay_s = 0.1
    with _connect(proxy, 2) as line:
        started = time.monotonic()
        line.sendall(b"a")
        assert line.recv(1) == b"a"
        assert time.monotonic() - started >= 0.2
