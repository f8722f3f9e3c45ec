"""Answers to clients who may go away: server-sent events (html.spec.whatwg.org, 9.2), and results that take time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from miaobi.serve.errors import json_bytes

T = TypeVar("T")
STUCK = 60.0  # seconds after which a client that reads nothing is given up
STILL_HERE = b": still here\n\n"


class ClientGoneError(Exception):
    """The client went away."""


def frame(value: Any, event: str | None = None) -> bytes:
    """One event."""
    named = f"event: {event}\n".encode() if event else b""
    return named + b"data: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Events as they come. When the client goes away, or reads nothing for long, `gone` is called."""

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncIterator[bytes], gone: Callable[[], None], headers: dict[str, str] | None = None
    ) -> None:
        """frames: one event or several, one behind the other."""
        self.frames, self.gone = frames, gone
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        self.raw_headers = [item for item in self.raw_headers if item[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        try:
            await unless_gone(receive, self.send_all(send))
        except (ClientGoneError, OSError, asyncio.TimeoutError):
            self.gone()
        except BaseException:
            self.gone()
            raise

    async def send_all(self, send: Send) -> None:
        """Headers, events, end."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self.frames:
            await asyncio.wait_for(send({"type": "http.response.body", "body": data, "more_body": True}), STUCK)
        await send({"type": "http.response.body", "body": b""})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Raises ClientGoneError where the client goes away before; then `work` is cancelled."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing = asyncio.ensure_future(work)
    tasks = doing, asyncio.ensure_future(listen())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(*tasks, return_exceptions=True)


async def result(request: Request, work: Coroutine[Any, Any, T], gone: Callable[[], None]) -> T:
    """`unless_gone` of a request whose body has been read."""
    try:
        return await unless_gone(request.receive, work)
    except ClientGoneError:
        gone()
        raise
