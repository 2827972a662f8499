"""Carries out the steps of tasks: one driver waits, the other awaits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, ExitStack, closing
from typing import Any, TypeVar

import httpx2

from loramill.producer.remote.errors import Unreachable
from loramill.producer.remote.steps import Body, Call, Do, Item, Next, Pause, Reply, Step, Steps

T = TypeVar("T")

# The connection was not there yet, so that nothing can have been done.
_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)
_STREAMED = 2**16


class Driver:
    """For threads that may wait. Any number of tasks at once."""

    def __init__(self, http: httpx2.Client) -> None:
        self.http = http

    def run(self, steps: Steps[T]) -> T:
        """The result of a task without items."""
        try:
            next(self.each(steps))
        except StopIteration as end:
            result: T = end.value
            return result
        raise AssertionError("the task has items")

    def each(self, steps: Steps[T]) -> Generator[Any, None, T]:
        """The items of a task, and then its result."""
        with closing(steps), ExitStack() as opened:
            stream = iter(())
            answer: Any = None
            error: Exception | None = None
            while True:
                try:
                    step = _advance(steps, answer, error)
                except StopIteration as end:
                    result: T = end.value
                    return result
                answer, error = None, None
                if isinstance(step, Item):
                    yield step.value
                    continue
                try:
                    match step:
                        case Call():
                            opened.close()
                            answer, stream = self._call(step, opened)
                        case Next():
                            answer = next(stream, None)
                        case Pause():
                            time.sleep(step.seconds)
                        case Do():
                            answer = step.work()
                except Exception as caught:
                    error = _ours(caught)

    def _call(self, call: Call, opened: ExitStack) -> tuple[Reply, Any]:
        if call.body is Body.WHOLE:
            return _reply(self.http.request(call.method, call.path, **_options(call, self.http))), iter(())
        response = opened.enter_context(self.http.stream(call.method, call.path, **_options(call, self.http)))
        if response.is_error:
            response.read()
            return _reply(response), iter(())
        is_events = call.body is Body.EVENTS
        return _opened(response), iter(httpx2.EventSource(response) if is_events else response.iter_bytes(_STREAMED))


class AsyncDriver:
    """For one event loop."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self.http = http

    async def run(self, steps: Steps[T]) -> T:
        """The result of a task without items."""
        result: list[T] = []
        async for _ in self.each(steps, result):
            raise AssertionError("the task has items")
        return result[0]

    async def each(self, steps: Steps[T], result: list[T] | None = None) -> AsyncGenerator[Any, None]:
        """The items of a task; its result goes into `result`."""
        with closing(steps):
            async with AsyncExitStack() as opened:
                stream: Any = None
                answer: Any = None
                error: Exception | None = None
                while True:
                    try:
                        step = _advance(steps, answer, error)
                    except StopIteration as end:
                        if result is not None:
                            result.append(end.value)
                        return
                    answer, error = None, None
                    if isinstance(step, Item):
                        yield step.value
                        continue
                    try:
                        match step:
                            case Call():
                                await opened.aclose()
                                answer, stream = await self._call(step, opened)
                            case Next():
                                answer = await anext(stream, None)
                            case Pause():
                                await asyncio.sleep(step.seconds)
                            case Do():
                                answer = await asyncio.to_thread(step.work)
                    except Exception as caught:
                        error = _ours(caught)

    async def _call(self, call: Call, opened: AsyncExitStack) -> tuple[Reply, Any]:
        if call.body is Body.WHOLE:
            return _reply(await self.http.request(call.method, call.path, **_options(call, self.http))), None
        streamed = self.http.stream(call.method, call.path, **_options(call, self.http))
        response = await opened.enter_async_context(streamed)
        if response.is_error:
            await response.aread()
            return _reply(response), None
        is_events = call.body is Body.EVENTS
        return _opened(response), aiter(httpx2.EventSource(response) if is_events else response.aiter_bytes(_STREAMED))


def _advance(steps: Steps[T], answer: Any, error: Exception | None) -> Step:
    return steps.send(answer) if error is None else steps.throw(error)


def _options(call: Call, http: httpx2.Client | httpx2.AsyncClient) -> dict[str, Any]:
    options: dict[str, Any] = {"params": dict(call.params), "headers": dict(call.headers)}
    if call.json is not None:
        options["json"] = call.json
    if call.form is not None:
        form = call.form
        # Named by a suffix that says nothing: the server goes by the file's name.
        options["files"] = {form.name: (form.filename, form.content, "application/octet-stream")}
        options["data"] = dict(form.fields)
    if call.timeout_s is not None:
        options["timeout"] = httpx2.Timeout(http.timeout.connect, read=call.timeout_s)
    return options


def _reply(response: httpx2.Response) -> Reply:
    return Reply(response.status_code, _lower(response), response.content)


def _opened(response: httpx2.Response) -> Reply:
    return Reply(response.status_code, _lower(response))


def _lower(response: httpx2.Response) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


def _ours(error: Exception) -> Exception:
    if not isinstance(error, httpx2.RequestError):
        return error
    sent = not isinstance(error, _UNSENT)
    what = "no answer in time from" if isinstance(error, httpx2.TimeoutException) else "no answer from"
    try:
        where = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}"
    except RuntimeError:
        where = "the server"
    made = Unreachable(f"{what} {where}: {str(error) or type(error).__name__}", sent=sent)
    made.__cause__ = error
    return made
