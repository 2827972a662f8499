"""What runs in a server beside the requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from loramill.producer.api.asking import questions_of
from loramill.producer.api.context import Api
from loramill.producer.api.minder import Minder
from loramill.producer.api.throughput import throughput_of
from loramill.producer.api.tidier import Tidier
from loramill.producer.api.webhook_post import Endpoint
from loramill.producer.api.webhooks import Webhooks
from loramill.producer.serve_options import ServeOptions
from loramill.schemas.failures import ExitCode, Failure


class Part(Protocol):
    """A thread or some, which outlive what goes wrong in them."""

    def start(self) -> None:
        """Begins."""

    def close(self) -> None:
        """Ends it, as soon as it can be left."""


def parts_of(api: Api, options: ServeOptions) -> Sequence[Part]:
    """In the order in which they are started. Raises Failure for settings that cannot be used."""
    webhooks = Webhooks(api, _endpoints(api, options), allow_private=options.webhook_allow_private)
    return [webhooks, Minder(api, webhooks.owe), Tidier(api.shelf, api.name), throughput_of(api), questions_of(api)]


def _endpoints(api: Api, options: ServeOptions) -> Callable[[str], Endpoint | None]:
    """Where the events of an owner go: to his key's, or those of a server without keys where its operator said."""
    if not api.keys.open:
        if options.webhook_url or options.webhook_secret_file:
            raise Failure(ExitCode.USAGE, "with --keys each key has its own webhook: `loramill keys new --webhook-url`")
        return lambda owner: key.endpoint if (key := api.keys.named(owner)) else None
    if options.webhook_url is None:
        return lambda owner: None
    if options.webhook_secret_file is None:
        raise Failure(ExitCode.USAGE, "--webhook-url needs --webhook-secret-file: what is sent there is signed")
    try:
        endpoint = Endpoint(options.webhook_url, options.webhook_secret_file.read_text().strip())
    except OSError as error:
        raise Failure(ExitCode.INPUT, f"{options.webhook_secret_file}: {error.strerror}") from error
    except ValueError as error:
        raise Failure(ExitCode.INPUT, str(error)) from error
    return lambda owner: endpoint
