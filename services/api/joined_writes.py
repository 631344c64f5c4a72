"""The server's HTTP protocol, with each answer in one write.

uvicorn writes the head of an answer and its body one after the other, and each write wakes the client: together they
cost a sixth of a short request.
"""

import asyncio
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class JoinedWrites:
    """A transport that writes once per turn of the event loop what it was given meanwhile."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.transport: Final = transport
        self._loop: Final = loop
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def close(self) -> None:
        self._flush()
        self.transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, []
            self.transport.write(b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        joined = JoinedWrites(cast(asyncio.Transport, transport), self.loop)
        super().connection_made(cast(asyncio.Transport, joined))

    def handle_websocket_upgrade(self) -> None:
        # Sockets mind how much is written but not read yet.
        self.transport = cast(JoinedWrites, self.transport).transport
        super().handle_websocket_upgrade()
