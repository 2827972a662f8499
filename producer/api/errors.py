"""What is wrong with a request, or with us: always in OpenAI's shape."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from loramill.store.errors import JobNotFound, StoreError, StoreFull, StoreUnreachable
from loramill.store.shelf import RecordNotFound

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
AWAY_RETRY_S = 2
"""After how long a client asks again when the store is away."""

_log = logging.getLogger("loramill.api")


class ErrorSaid(BaseModel):
    """The inside of an error's body."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorSaid


class ApiError(Exception):
    """Ends a request with `status`. The official client makes its exception of it, with `code` and `param`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """As it is sent."""
        said = ErrorSaid(message=self.message, type=type_of(self.status), param=self.param, code=self.code)
        return JSONResponse(ErrorBody(error=said).model_dump(), self.status, self.headers)


def type_of(status: int) -> str:
    """OpenAI's word for errors of a status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def invalid(message: str, *, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """400: what was asked for makes no sense."""
    return ApiError(400, message, code=code, param=param)


def not_found(what: str, id: str, *, param: str | None = None) -> ApiError:
    """404: it is not there, or it is somebody else's, which is not told apart."""
    return ApiError(404, f"no such {what}: {id}", code=f"{what.replace(' ', '_')}_not_found", param=param)


def of_store(error: StoreError) -> ApiError:
    """What the store cannot do, as an answer."""
    if isinstance(error, JobNotFound | RecordNotFound):
        return ApiError(404, str(error), code="not_found")
    if isinstance(error, StoreUnreachable):
        again = {"retry-after": str(AWAY_RETRY_S)}
        return ApiError(503, "the store does not answer; try again", code="store_unreachable", headers=again)
    if isinstance(error, StoreFull):
        # Asking again at once, as clients do by themselves, makes no room.
        return ApiError(507, "the store is full", code="storage_full", headers={"x-should-retry": "false"})
    return ApiError(503, "the store cannot be used", code="store_failed", headers={"x-should-retry": "false"})


def place_of(error: BaseException) -> str:
    """What to log of an error that nobody foresaw: where it was raised, and not what it says, which may hold what was
    in a request or a row."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"


def install(app: FastAPI) -> None:
    """Has every error of `app` answered in OpenAI's shape."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def stores(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StoreError)
        answer = of_store(error)
        if answer.status >= 500:
            _log.error("%s %s: %s", request.method, request.url.path, error)
        return answer.response()

    async def frameworks(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = CODES.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal_error")
        headers = dict(error.headers or {})
        return ApiError(error.status_code, str(error.detail), code=code, headers=headers).response()

    async def fields(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:]]  # after whether it is in the body, the query, the path
        name = ".".join(where) or None
        return invalid(f"{name or 'the request'}: {first['msg']}", param=name).response()

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed: %s", request.method, request.url.path, place_of(error))
        return ApiError(500, "something went wrong here; the server's log says what", code="internal_error").response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(StoreError, stores)
    app.add_exception_handler(HTTPException, frameworks)
    app.add_exception_handler(RequestValidationError, fields)
    app.add_exception_handler(Exception, unforeseen)
