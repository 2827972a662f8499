"""One server: uvicorn around the API, what runs beside it, and how it ends."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import uvicorn

from loramill.producer.api.app import Application, make_app
from loramill.producer.api.background import Part, parts_of
from loramill.producer.api.connection import Connection
from loramill.producer.api.context import Api, Limits
from loramill.producer.api.keys import Keys, KeysUnreadable
from loramill.producer.embedded import EmbeddedWorker
from loramill.producer.serve_options import ServeOptions
from loramill.producer.store_options import store_of
from loramill.schemas.failures import ExitCode, Failure

FINISH_S = 10
"""For requests that run when the server is told to end."""
KEEP_ALIVE_S = 20
BACKLOG = 512
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def run_server(options: ServeOptions) -> ExitCode:
    """Serves until it is told to end; a second signal ends it at once. For the main thread. Raises Failure."""
    _without_torch()
    with ExitStack() as stack:
        try:
            keys = Keys(options.keys)
        except KeysUnreadable as error:
            raise Failure(ExitCode.INPUT, str(error)) from error
        listener = stack.enter_context(_listen(options.host, options.port, open_to_all=keys.open))
        store = stack.enter_context(store_of(options, create=True))
        api = Api(
            store, keys, _limits(options), store_url=options.store or "", base=options.base, broker=options.broker,
            prefix=options.store_prefix, name=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}",
        )  # fmt: skip
        parts = parts_of(api, options)
        hosts = {*_LOOPBACK, _written(options.host).lower()} if keys.open else None
        server = _Server(make_app(api, hosts), _url(options.host, listener))
        # From here on nothing is refused, and what is said and heard is the server's.
        _log_to_stderr()
        _stop_by_signals(server)
        if options.embedded:
            _start(EmbeddedWorker(options.worker, server.fail), stack)
        for part in parts:
            _start(part, stack)
        server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure
    return ExitCode.OK


def config_of(app: Application) -> uvicorn.Config:
    """How uvicorn is to serve it. h11 alone, whatever else is installed: its limits are known."""
    return uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=FINISH_S, backlog=BACKLOG,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """It says when it listens, and lets others decide when it ends."""

    def __init__(self, app: Application, url: str) -> None:
        super().__init__(config_of(app))
        self._app, self._url = app, url
        self.failure: Failure | None = None

    def fail(self, failure: Failure) -> None:
        """Ends it, and why. From any thread."""
        self.failure, self.should_exit = failure, True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        logging.getLogger("loramill.api").info("listening on %s", self._url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.closing.set()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _stop_by_signals(server: _Server) -> None:
    """The first asks for an orderly end, the second ends at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if server.should_exit:
            os._exit(ExitCode.INTERRUPTED)
        server.should_exit = True
        os.write(2, b"finishing the requests that run; once more to stop at once\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _start(part: Part, stack: ExitStack) -> None:
    part.start()
    stack.callback(part.close)


def _limits(options: ServeOptions) -> Limits:
    most = Limits()
    return Limits(options.max_file_bytes or most.file_bytes, most.part_bytes, most.body_bytes, options.retention_s)


def _listen(host: str, port: int, *, open_to_all: bool) -> socket.socket:
    """Raises Failure: nobody else must be able to call a server that asks for no key."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise Failure(ExitCode.USAGE, f"--host {host} is no address: {error}") from error
    family, _, _, _, address = min(found, key=lambda one: one[0])  # IPv4 before IPv6, as `localhost` is both
    if open_to_all and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise Failure(
            ExitCode.USAGE, f"--host {host} can be reached by others, and there are no keys: make one with `loramill "
            "keys new NAME --keys FILE`, and give --keys FILE",
        )  # fmt: skip
    try:
        return socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise Failure(ExitCode.USAGE, f"--host {host} is not an address of this machine") from error
        hint = "; --port 0 takes one that is free" if error.errno == errno.EADDRINUSE else ""
        raise Failure(ExitCode.MACHINE, f"cannot listen on {host}, port {port}: {error.strerror}{hint}") from error


def _written(host: str) -> str:
    """As it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{_written(host)}:{listener.getsockname()[1]}"


def _without_torch() -> None:
    """Of transformers a server needs the tokenizers, which do without torch. It would come with them if it could, and
    take four seconds and 330 MB."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # of just that
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]


def _log_to_stderr() -> None:
    """One line an event, as a worker's."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("loramill", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
