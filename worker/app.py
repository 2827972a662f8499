"""`celery -A loramill.worker.app worker -P threads -c 4`: a worker that takes tickets. Its settings are the LORAMILL_*
variables; `loramill worker` runs it with those of its own flags."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
import warnings
from typing import Any, NoReturn

from celery import Celery, signals
from celery.apps.worker import Worker
from celery.exceptions import CPendingDeprecationWarning
from celery.platforms import SecurityWarning
from celery.worker import state

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.base_files import base_name_of
from loramill.worker.housekeeping import Housekeeping
from loramill.worker.lifeline import follow_lifeline
from loramill.worker.node import Node, open_node
from loramill.worker.tickets import TASK, broker_of, make_app, top_up
from loramill.worker.worker_log import line_of, log
from loramill.worker.worker_settings import WorkerOptions, worker_options_from

warnings.simplefilter("ignore", SecurityWarning)  # of running as root: in a container there is nobody else
# Of a setting for late acknowledgements, which there are none of.
warnings.simplefilter("ignore", CPendingDeprecationWarning)

LOOK_S = 0.2
LAST_S = 1.0
"""What Celery gets to end by itself once nothing is left to wait for."""


def _read() -> tuple[WorkerOptions, Celery]:
    options = worker_options_from(os.environ)
    broker = broker_of(options.store, options.broker)
    base = options.base_name or base_name_of(options.base_model)
    return options, make_app(broker, prefix=options.store_prefix, base=base)


def _end(failure: Failure) -> NoReturn:
    for line in failure.lines:
        log(f"Error: {line}")
    sys.exit(int(failure.code))


class _QuietWorker(Worker):  # type: ignore[misc]
    """Celery's, which says nothing on standard output, and knows nothing of other workers: with mingle and gossip some
    stop consuming after a reconnect (celery #8030, #8091, #8384)."""

    def prepare_args(self, **given: Any) -> dict[str, Any]:
        """Its options."""
        return given | {"without_mingle": True, "without_gossip": True}

    def emit_banner(self) -> None:
        """None."""


options: WorkerOptions | Failure
try:
    options, app = _read()
except Failure as failure:  # said when a worker starts, and not to whoever only imports this
    options, app = failure, make_app("memory://", base="none")
app.Worker = app.subclass_with_self(_QuietWorker, name="Worker")
_serving: list[tuple[Node, Housekeeping]] = []


@app.task(name=TASK)  # type: ignore[untyped-decorator]
def work() -> None:
    """There is work."""
    for node, _ in _serving:
        node.work()


class _OneLine(logging.Formatter):
    """Celery's log as ours: a lost connection is one line, which names the error, and no traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        why = f": {record.exc_info[1]!r}" if record.exc_info and record.exc_info[1] else ""
        return line_of(f"{record.getMessage().strip()}{why}")


@signals.after_setup_logger.connect  # type: ignore[untyped-decorator]
def _say_one_line(logger: logging.Logger, **_: Any) -> None:
    for handler in logger.handlers:
        handler.setFormatter(_OneLine())


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _start(**_: Any) -> None:
    try:
        if isinstance(options, Failure):
            raise options
        node = open_node(options)
    except Failure as failure:
        _end(failure)
    except Exception:
        # Celery would log it, to nobody, and wait for tickets without a node.
        traceback.print_exc()
        sys.exit(int(ExitCode.MACHINE))
    housekeeping = Housekeeping(node, lambda base, ready: top_up(app, base, ready))
    _serving.append((node, housekeeping))
    node.start()
    housekeeping.start()
    threading.Thread(target=_oversee, args=(node, housekeeping), daemon=True).start()
    follow_lifeline()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _drain(**_: Any) -> None:
    for node, _housekeeping in _serving:
        node.drain.ask()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _stop(**_: Any) -> None:
    for node, housekeeping in _serving:
        housekeeping.stop()
        node.close()


def _oversee(node: Node, housekeeping: Housekeeping) -> None:
    """Ends Celery when the worker is to end; and the process, should a thread of it wait for what does not come, or
    Celery take its time: then with a goodbye of its own, if the store answers while there is time."""
    while housekeeping.code is None and not node.drain.asked:
        time.sleep(LOOK_S)
    node.drain.ask()
    if housekeeping.code is not None:
        state.should_stop = housekeeping.code
    while not node.drain.over and not node.idle:
        time.sleep(LOOK_S)
    time.sleep(LAST_S if housekeeping.code is None else 2 * LAST_S)
    ending = threading.Thread(target=_stop, daemon=True)
    ending.start()
    while ending.is_alive() and not node.drain.over:
        time.sleep(LOOK_S)
    for engine in node.engines:
        engine.kill()
    os._exit(housekeeping.code or 0)
