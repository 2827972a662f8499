"""The application: its routes, and what is done around them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI

import loramill
from loramill.producer.api import adapters, errors, metrics
from loramill.producer.api.context import Api
from loramill.producer.api.errors import ErrorBody

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

ROUTERS: tuple[APIRouter, ...] = (adapters.router, metrics.router)


def make_app(api: Api) -> FastAPI:
    """The API of one server. It closes nothing of `api`."""
    app = FastAPI(title="loramill", version=loramill.__version__, responses=_ERRORS, docs_url=None, redoc_url=None)
    app.state.api = api
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(metrics.CountRequests)
    return app
