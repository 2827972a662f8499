"""A request's body by itself, where only the moment matters."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message

from loramill.producer.api.bodies import Body
from loramill.producer.api.context import Limits


def test_a_server_that_ends_gives_up_reading_and_completes_its_answer() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def scenario() -> None:
        closing, reads = asyncio.Event(), asyncio.Event()

        async def receive() -> Message:
            reads.set()
            return await asyncio.Future()

        upload, headers = {"method": "POST", "path": "/v1/files"}, Headers({"content-length": "9"})
        body = Body(upload, headers, receive, Limits(), closing)
        await body.send({"type": "http.response.start", "status": 503, "headers": []}, send)
        answering = asyncio.create_task(body.send({"type": "http.response.body", "body": b"so"}, send))
        await reads.wait()
        closing.set()
        answering.cancel()
        await answering

    asyncio.run(scenario())
    assert [(message.get("body"), message.get("more_body")) for message in sent[1:]] == [(b"so", True), (b"", False)]
