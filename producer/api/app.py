"""The application: its routes, and what is done around them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

import loramill
from loramill.producer.api import (
    adapters,
    batches,
    chat,
    errors,
    files,
    health,
    job_actions,
    metrics,
    models,
    page,
    session,
    uploads,
)
from loramill.producer.api.context import Api
from loramill.producer.api.errors import ErrorBody
from loramill.producer.api.gate import Gate

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

ROUTERS: tuple[APIRouter, ...] = (
    files.router,
    uploads.router,
    batches.router,
    chat.router,
    health.router,
    models.router,
    session.router,
    page.router,
    job_actions.router,
    adapters.router,
    metrics.router,
)


class Application(FastAPI):
    """FastAPI with our gate around everything that it does, its answers to what went wrong included."""

    def __init__(self, api: Api, hosts: Collection[str] | None) -> None:
        super().__init__(
            title="loramill",
            version=loramill.__version__,
            responses=_ERRORS,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
        )
        self.state.api = api
        self.hosts = hosts
        self.closing = asyncio.Event()
        """Set when the server is to end: whoever only watches is let go."""

    def build_middleware_stack(self) -> ASGIApp:
        """FastAPI's, and the gate."""
        return Gate(super().build_middleware_stack(), self.state.api, hosts=self.hosts, closing=self.closing)


def make_app(api: Api, hosts: Collection[str] | None = None) -> Application:
    """The API of one server, which answers to these names only, or to any. It closes nothing of `api`."""
    app = Application(api, hosts)
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
