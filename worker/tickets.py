"""Tickets: messages that say "there is work" to whoever waits for one. They may be lost or doubled, nothing depends on
them: the store is asked what there is to do."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from celery import Celery
from kombu.exceptions import OperationalError

from loramill.schemas.failures import ExitCode, Failure
from loramill.store.errors import StoreUnreachable

TASK = "loramill.work"
CAP = 256
"""More tickets than threads that could take one are of no use."""
CONNECT_S = 5
_OURS = {"volatile"}
"""Of a store's URL, nothing to a broker."""


def queue_of(base: str) -> str:
    """The queue of the workers that serve this base."""
    return f"loramill-{base}"


def broker_of(store: str, broker: str | None = None) -> str:
    """The broker's URL: `broker`, or else the store's Redis. Raises Failure (USAGE) if there is none."""
    if broker:
        return broker
    url = urlsplit(store)
    query = [(key, value) for key, value in parse_qsl(url.query) if key not in _OURS]
    if url.scheme in ("redis", "rediss"):
        return urlunsplit(url._replace(query=urlencode(query)))
    if url.scheme == "unix":
        host = dict(query).get("db", "0")
        return f"redis+socket://{url.netloc}{unquote(url.path)}?virtual_host={host}"
    raise Failure(ExitCode.USAGE, f"--store {store} has no broker for tickets: give --broker redis://HOST:PORT/DB")


def make_app(broker: str, *, prefix: str = "loramill", base: str | None = None) -> Celery:
    """A Celery application that sends tickets and, for workers of `base`, takes them."""
    app = Celery("loramill", broker=broker, set_as_current=base is not None)
    app.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,  # results live in our store: no chords, no result backend
        task_acks_late=False,  # leases redeliver, not the broker
        worker_prefetch_multiplier=1,  # and not worker_disable_prefetch: 64 short tickets a second become 4
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": 3600,
            "global_keyprefix": f"{prefix}:tickets:",
            "socket_timeout": 30,
            "socket_connect_timeout": CONNECT_S,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "retry_on_timeout": True,
        },
    )
    if broker.startswith("rediss:"):
        app.conf.broker_use_ssl = {"ssl_cert_reqs": "required"}  # kombu speaks no TLS otherwise; the URL may say more
    if base is not None:
        app.conf.task_default_queue = queue_of(base)
    return app


def top_up(app: Celery, base: str, ready: int, cap: int = CAP) -> int:
    """Sends as many tickets as it takes for `ready` shards, beside those that wait. Returns how many.

    Raises StoreUnreachable if the broker does not answer.
    """
    name = queue_of(base)
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=CONNECT_S)
            queue = app.amqp.queues.new_missing(name).bind(connection.default_channel)
            waiting = int(queue.queue_declare().message_count)
            wanted = max(0, min(ready, cap) - waiting)
            with app.amqp.Producer(connection) as producer:
                for _ in range(wanted):
                    app.send_task(TASK, queue=name, producer=producer, ignore_result=True)
    except (OperationalError, OSError) as error:
        raise StoreUnreachable(f"tickets cannot be sent: {error}") from error
    return wanted
