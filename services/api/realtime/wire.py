"""The server's WebSocket protocol, with bounds on what a slow reader costs.

The server's own makes whoever sends wait until a slow client has read, and closing wait for the same. Here
nobody waits: frames queue up to a limit, a client that lets it overflow is closed, and one that does not
take leave in time is cut off. And a frame for many is framed once.
"""

import asyncio
from collections import deque
from typing import Any, Final, cast

from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode

QUEUE_LIMIT: Final = 256
"""Frames that wait for a client to read, besides those on their way through the network."""

TOO_SLOW: Final = 1013
RESTART: Final = 1012
NO_PONG: Final = 1011
LEAVE_SECONDS: Final = 5.0
"""How long a closed client may take to say so too."""

_EXTENSION: Final = "sessiongate.wire"


def framed(text: bytes) -> bytes:
    """`text`, which is UTF-8, as it goes over the wire to any client. There are no extensions to mind."""
    return Frame(Opcode.TEXT, text).serialize(mask=False)


class Wire(WebSocketsSansIOProtocol):
    """One connection. `closed_with` is the code it was closed with, by whomever; 1006 when it just broke off. Once it
    is `ended` from here, what is still to be received came too late."""

    closed_with = 1006
    ended = False
    too_slow = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._queue: deque[tuple[bytes, int]] = deque()
        self._queued = 0

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = cast(Any, self.scope["extensions"])
        extensions[_EXTENSION] = self
        await super().run_asgi()

    @classmethod
    def of(cls, websocket: WebSocket) -> "Wire":
        """The connection under a websocket."""
        return cast(Wire, websocket.scope["extensions"][_EXTENSION])

    def write(self, frames: bytes, number: int = 1) -> None:
        """Sends so many frames that `framed` made, now or once the client has read what came before. Never waits;
        what is written after the end is lost."""
        if self._is_ending():
            return
        if self.writable.is_set():
            self.transport.write(frames)
        elif self._queued + number <= QUEUE_LIMIT:
            self._queue.append((frames, number))
            self._queued += number
        else:
            self.too_slow = True
            self.end(TOO_SLOW)

    async def drained(self) -> None:
        """Returns once nothing is queued, or the connection is ending."""
        while not (self.writable.is_set() or self._is_ending()):
            await self.writable.wait()

    def end(self, code: int) -> None:
        """Closes after what is queued."""
        if self._is_ending():
            return
        self.transport.writelines([frames for frames, _ in self._queue])
        try:
            self.conn.send_close(code)
        except InvalidState:
            return  # The client was first.
        self.ended = True
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code})
        self.close_sent = True
        self.stop_keepalive()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self._leave(code)

    def resume_writing(self) -> None:
        super().resume_writing()
        while self._queue and self.writable.is_set():
            frames, number = self._queue.popleft()
            self._queued -= number
            self.transport.write(frames)

    def handle_close(self, event: Frame) -> None:
        if not self.close_sent and self.conn.close_rcvd is not None:
            self._leave(self.conn.close_rcvd.code)
        super().handle_close(event)

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is not None:
            self._leave(self.conn.close_sent.code)
        super().handle_parser_exception()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.closed_with = NO_PONG
        self.transport.abort()

    def shutdown(self) -> None:
        if not self._is_ending():
            self._leave(RESTART)
        super().shutdown()

    def _leave(self, code: int) -> asyncio.TimerHandle:
        """Nobody waits any more for the client to read; answers the timer that cuts the connection."""
        self.closed_with = code
        self._queue.clear()
        self._queued = 0
        self.writable.set()
        return self.loop.call_later(LEAVE_SECONDS, self.transport.abort)

    def _is_ending(self) -> bool:
        return bool(self.close_sent or self.transport.is_closing())
