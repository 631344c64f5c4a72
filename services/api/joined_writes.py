"""The server's HTTP protocol, with each answer in one write.

uvicorn writes the head of an answer and its body one after the other. Each write wakes the client, which costs more
than anything else the server does for a short request.
"""

import asyncio
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HELD_BYTES: Final = 65_536
"""More than that is not held back, so that whoever sends much learns in time that the client does not read it."""


class JoinedWrites:
    """A transport that writes at once what it was given in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.transport: Final = transport
        self._loop: Final = loop
        self._held: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._write_held)
        self._held.append(data)
        self._size += len(data)
        if self._size > HELD_BYTES:
            self._write_held()

    def close(self) -> None:
        self._write_held()
        self.transport.close()

    def _write_held(self) -> None:
        if self._held and not self.transport.is_closing():
            self.transport.write(b"".join(self._held))
        self._held.clear()
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class HttpProtocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        joined = JoinedWrites(cast(asyncio.Transport, transport), self.loop)
        super().connection_made(cast(asyncio.Transport, joined))

    def handle_websocket_upgrade(self) -> None:
        # A socket has to know how much its client has not read yet.
        self.transport = cast(JoinedWrites, self.transport).transport
        super().handle_websocket_upgrade()
