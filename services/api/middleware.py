"""What wraps every request besides the telemetry: the bounds on its body. Pure ASGI."""

import asyncio
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BoundedBody:
    """Bounds what a request body may cost: bytes, and seconds until all of it has arrived.

    Nothing is read here: whoever reads the body (after the caller is known) meets the bound as a 413 or
    408. The deadline holds for receiving alone and never cancels a handler at work.
    """

    def __init__(self, app: ASGIApp, *, limit: int, seconds: float) -> None:
        self._app: Final = app
        self._limit: Final = limit
        self._seconds: Final = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self._seconds
        announced = next((int(v) for k, v in scope["headers"] if k == b"content-length" and v.isdigit()), 0)

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            if announced > self._limit:
                raise HTTPException(413)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408) from None
            received += len(message.get("body", b""))
            if received > self._limit:
                raise HTTPException(413)
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, bounded, send)


class SecurityHeaders:
    """Headers that hold for every answer: nothing is cached, sniffed, framed or, once seen on TLS, sent in clear."""

    HEADERS: Final = (
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        (b"content-security-policy", b"frame-ancestors 'none'"),
        (b"referrer-policy", b"no-referrer"),
        (b"strict-transport-security", b"max-age=31536000"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app: Final = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.HEADERS]
            await send(message)

        await self._app(scope, receive, secured)
