"""What wraps every request besides the telemetry: the bounds on its body. Pure ASGI."""

import asyncio
from collections.abc import Generator, Mapping
from typing import Any, Final, cast

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_SECONDS: Final = 0.5
"""How long a client that is still sending has to notice the answer. It would not find it on a connection that
was closed while it sent."""


class BoundedBody:
    """Bounds what a request body may cost: bytes (`longer` has paths with bounds of their own), and seconds until all
    of it has arrived.

    Nothing is read here: whoever reads the body (after the caller is known) meets the bound as a 413 or
    408. The deadline holds for receiving alone and never cancels a handler at work. Where the answer comes before
    the end of a body that may be longer than the bound, the rest is not read: the connection is closed.
    """

    def __init__(self, app: ASGIApp, *, limit: int, longer: Mapping[str, int], seconds: float) -> None:
        self._app: Final = app
        self._limit: Final = limit
        self._longer: Final = longer
        self._seconds: Final = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._longer.get(scope["path"], self._limit)
        received = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self._seconds
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        announced = int(length) if length.isdigit() else 0
        endless = announced > limit or b"transfer-encoding" in headers

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            if announced > limit:
                raise HTTPException(413)
            try:
                message = await _within(deadline, receive)
            except TimeoutError:
                raise HTTPException(408) from None
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413)
            complete = not message.get("more_body", False)
            return message

        async def hanging_up(message: Message) -> None:
            if complete or not endless:
                await send(message)
            elif message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
                await send(message)
            else:
                await send({**message, "more_body": True})
                if not message.get("more_body", False):
                    await asyncio.sleep(LINGER_SECONDS)
                    await send({"type": "http.response.body"})

        await self._app(scope, bounded, hanging_up)


async def _within(deadline: float, receive: Receive) -> Message:
    """What `receive` answers. Raises TimeoutError at the deadline, for which a timer is set only if there is something
    to wait for: most bodies come with their heads."""
    steps = receive().__await__()
    try:
        awaited = next(steps)
    except StopIteration as arrived:
        return cast(Message, arrived.value)
    async with asyncio.timeout_at(deadline):
        return await _Resumed(awaited, steps)


class _Resumed(Generator[Any, Any, Message]):
    """What is left of an awaitable that was begun, and waits for `awaited`."""

    def __init__(self, awaited: Any, steps: Generator[Any, Any, Message]) -> None:
        self._awaited = [awaited]
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, Message]:
        return self

    def send(self, value: Any) -> Any:
        return self._awaited.pop() if self._awaited else self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        return self._steps.throw(*error)


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
