"""Tells workers that there is a job, by tickets where there is a broker. They would find it by themselves too."""

from __future__ import annotations

from loramill.producer.submit import Submitted
from loramill.store.contract import JobStore
from loramill.store.errors import StoreError

_WITH_BROKER = ("redis:", "rediss:", "unix:")


def announce(done: Submitted, store: JobStore, url: str, *, prefix: str, broker: str | None = None) -> str | None:
    """Sends tickets for a job that was just accepted into the store at `url`; what hindered that, in one line: the job
    is accepted all the same, and idle workers look for themselves every few seconds."""
    if done.checked is None or not (broker or url.startswith(_WITH_BROKER)):
        return None
    from loramill.worker.tickets import broker_of, make_app, top_up

    offer = done.checked.served.offer
    try:
        app = make_app(broker_of(url, broker), prefix=prefix)
        top_up(app, offer.names.base, store.ready().get(offer.base_id, 0))
    except StoreError as error:
        return f"{error}; workers find the job by themselves"
    return None
