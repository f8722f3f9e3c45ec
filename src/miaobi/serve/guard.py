"""What stands in front of every path: an id for the request, keys, limits of bodies, and a line in the log."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
import traceback
import uuid
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miaobi.console import log
from miaobi.serve.errors import APIError
from miaobi.serve.metrics import Metrics
from miaobi.serve.sse import ClientGoneError

MAX_BODY = 4 << 20
BODY_SECONDS = 30.0  # in which a body must have come
OPEN = ("/health",)
"""Paths that need no key, besides the page and its assets."""


def is_local(host: str) -> bool:
    """Whether a Host header names this machine, not by a name that somebody else may point to it: localhost, or an
    address.
    """
    name = re.sub(r":\d+$", "", host).lower()
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class Named:
    """ASGI middleware, the outermost: every answer carries an id, that of a preflight too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["request_id"] = request_id = f"req_{uuid.uuid4().hex}"

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = ((b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff"))
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await self.app(scope, receive, named)


class Guard:
    """ASGI middleware: who may come in, with how much; and a line in the log."""

    def __init__(
        self, app: ASGIApp, key: str | None, only_local: bool, guarded: Collection[str], metrics: Metrics
    ) -> None:
        """guarded: beginnings of paths that need the key. only_local: answer only those who call this machine by a name
        of its own: a page of another site, whose name was pointed here, does not (DNS rebinding).
        """
        self.app, self.key, self.only_local, self.metrics = app, key, only_local, metrics
        self.guarded = tuple(guarded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, Body(receive), tell)
        except APIError as error:
            await error.response()(scope, receive, tell)
        except ClientGoneError:  # nobody to answer
            pass
        except Exception as error:
            log("".join(traceback.format_exception(error)))
            if not status:
                failure = APIError(500, "an error of the server's own; its log says which", "internal_error")
                await failure.response()(scope, receive, tell)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            if scope["method"] == "POST" or status >= 400:
                seconds = time.perf_counter() - began
                log(f"{scope['method']} {scope['path'][:200]} {status or 'gone'} {seconds:.2f} s {scope['request_id']}")

    def check(self, scope: Scope) -> None:
        """Raises APIError for who may not come in, and for what is too much."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"localhost").decode("latin-1")
        if self.only_local and not is_local(host):
            raise APIError(403, f"this server is for its own machine, and was called {host[:80]!r}; give it an "
                           "--api_key to serve under other names", "host_not_allowed")  # fmt: skip
        if self.key is not None and scope["path"].startswith(self.guarded):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), self.key.encode()) or scheme.lower() != b"bearer":
                message = ("Incorrect API key provided." if given else "You didn't provide an API key: send it as "
                           "Authorization: Bearer KEY.")  # fmt: skip
                raise APIError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > MAX_BODY:
            raise too_large()


def too_large() -> APIError:
    """The error."""
    return APIError(413, f"the body has more than {MAX_BODY:,} bytes; send less at a time", "request_too_large",
                    headers={"Connection": "close"})  # fmt: skip


class Body:
    """`receive` that takes so many bytes and seconds until a body is whole."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.size, self.whole = receive, 0, False
        self.until = time.perf_counter() + BODY_SECONDS

    async def __call__(self) -> Message:
        """As ASGI calls it. Raises HTTPException, which goes through FastAPI's reading of bodies."""
        if self.whole:
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), self.until - time.perf_counter())
        except asyncio.TimeoutError as e:
            raise HTTPException(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from e
        self.size += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.size > MAX_BODY:
            raise HTTPException(413, too_large().message)
        return message
