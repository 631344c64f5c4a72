"""What fanning out is measured against: a bare protocol on uvloop that tells every socket of a room what comes from
Redis, each frame encoded once and those of a burst written at once. `python -m tests.benchmarks.fanout_limit PORT
REDIS_SOCKET`.
"""

import asyncio
import base64
import hashlib
import sys
from collections import defaultdict
from typing import Final, cast

import hiredis
import uvloop
from websockets.frames import Frame, Opcode

from tests.benchmarks.fanout_load import LIMIT_CHANNEL

_ACCEPT: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

_rooms: Final[defaultdict[bytes, list[asyncio.Transport]]] = defaultdict(list)


class Socket(asyncio.Protocol):
    """`GET /7` is a socket of room 7."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        lines = data.split(b"\r\n")
        key = next(line.partition(b": ")[2] for line in lines if line.startswith(b"Sec-WebSocket-Key"))
        accept = base64.b64encode(hashlib.sha1(key + _ACCEPT).digest())
        upgrade = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self._transport.write(upgrade + b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept)
        _rooms[lines[0].split()[1][1:]].append(self._transport)


class Redis(asyncio.Protocol):
    def __init__(self) -> None:
        self._reader = hiredis.Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(f"SUBSCRIBE {LIMIT_CHANNEL}\r\n".encode())

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        bursts: defaultdict[bytes, list[bytes]] = defaultdict(list)
        while (reply := self._reader.gets()) is not False:
            if reply[0] == b"message":
                room, _, text = reply[2].partition(b" ")
                bursts[room].append(Frame(Opcode.TEXT, text).serialize(mask=False))
        for room, frames in bursts.items():
            burst = b"".join(frames)
            for transport in _rooms[room]:
                transport.write(burst)


async def main(port: int, redis_socket: str) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(Redis, redis_socket)
    server = await loop.create_server(Socket, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
