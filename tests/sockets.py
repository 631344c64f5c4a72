"""Sockets for tests: the real client of the `websockets` library, against a running API."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from libs.guardrails import Principal
from tests.processes import ApiProcess
from tests.running import Api, token_of

PROTOCOL: Final = Subprotocol("sessiongate.v1")
PATIENCE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Socket:
    """A client's end. Frames are dicts; those that a test did not ask for are kept in `seen`."""

    connection: ClientConnection
    seen: list[dict[str, Any]]

    async def send(self, **frame: Any) -> None:
        await self.connection.send(orjson.dumps(frame).decode())

    async def receive(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            frame: dict[str, Any] = orjson.loads(await self.connection.recv())
        self.seen.append(frame)
        return frame

    async def next(self, *types: str) -> dict[str, Any]:
        """The next frame of one of these types."""
        while (frame := await self.receive())["type"] not in types:
            pass
        return frame

    async def until_caught_up(self) -> list[dict[str, Any]]:
        """All frames up to `caught_up`."""
        frames = []
        while (frame := await self.receive())["type"] != "caught_up":
            frames.append(frame)
        return frames

    async def close_code(self) -> int | None:
        """The code that the server closes with, after whatever it still sends."""
        try:
            while True:
                await self.receive()
        except ConnectionClosed:
            return self.connection.close_code

    def of(self, type_: str) -> list[dict[str, Any]]:
        return [frame for frame in self.seen if frame["type"] == type_]


def address(api: Api | ApiProcess, context: object) -> str:
    return f"{api.url.replace('http', 'ws', 1)}/api/v1/chat/{context}/socket"


@asynccontextmanager
async def opened(
    api: Api | ApiProcess,
    caller: Principal | None,
    context: object,
    *,
    subprotocols: tuple[str, ...] = (PROTOCOL,),
    **options: Any,
) -> AsyncIterator[Socket]:
    """A socket whose handshake is done; without a caller it has no token."""
    headers = {"Authorization": f"Bearer {token_of(caller)}"} if caller else {}
    headers |= options.pop("headers", {})
    connection = await connect(
        options.pop("url", address(api, context)),
        additional_headers=headers,
        subprotocols=[Subprotocol(each) for each in subprotocols] or None,
        max_size=None,
        close_timeout=1,
        **options,
    )
    try:
        yield Socket(connection, [])
    finally:
        await connection.close()


@asynccontextmanager
async def following(api: Api | ApiProcess, caller: Principal, context: object, **hello: Any) -> AsyncIterator[Socket]:
    """A socket that has said hello and is live."""
    async with opened(api, caller, context) as socket:
        await socket.send(type="hello", **hello)
        await socket.until_caught_up()
        yield socket
