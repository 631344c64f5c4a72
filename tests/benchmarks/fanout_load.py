"""Sockets that count what they are told, and the messages that are told: in a process of its own.

What arrives is searched for the mark of a message and not parsed. Latencies run from the moment the servers can know
of a message to the arrival at each of the sockets.
"""

import asyncio
import multiprocessing
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import asyncpg
import psutil
import uvloop

from libs.domain.news import CHANNEL, News
from tests.benchmarks.harness import Figures, percentile
from tests.processes import PATIENCE_SECONDS

MARK: Final = b'"type":"message"'
LIMIT_CHANNEL: Final = "fanout"
"""Where the other contestants get their messages: the room's number, a space, and the text to send."""

WINDOW: Final = 4
"""Batches on their way at full speed, so that nobody waits for the next one; all of them fit into the product's
queue of a socket, which closes those that read too slowly."""

# $1 conversations, $2 how many messages each, $3 body.
_STORE: Final = """
    WITH numbered AS (
        UPDATE conversations SET last_seq = last_seq + $2 WHERE id = ANY ($1::bigint[])
        RETURNING id, tenant_id, last_seq - $2 AS before
    )
    INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body)
    SELECT n.tenant_id, n.id, n.before + k, p.user_id, n.before + k, 'text', $3
    FROM numbered n JOIN participants p ON p.conversation_id = n.id AND p.role = 'patient'
    CROSS JOIN generate_series(1, $2) k
"""


@dataclass(frozen=True)
class Opening:
    """How a socket of a room is opened: path and headers, the text to send first, and what is received when it is
    ready (nothing but the upgrade if empty)."""

    path: str
    headers: str = ""
    hello: str = ""
    ready: bytes = b""

    def request(self) -> bytes:
        fixed = "Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        return f"GET {self.path} HTTP/1.1\r\n{fixed}{key}{self.headers}\r\n".encode()

    def first_frame(self) -> bytes:
        # Masked, as a client's frames must be, with zeros.
        text = self.hello.encode()
        return b"\x81" + struct.pack("!B4x", 0x80 | len(text)) + text if text else b""


@dataclass(frozen=True)
class Shape:
    """So many rooms with so many sockets. At full speed each batch brings `batch` messages to every room; at an even
    pace one room after the other gets a message, `per_second` in all."""

    rooms: int
    sockets: int
    batch: int
    per_second: int

    def __str__(self) -> str:
        return f"{self.rooms}x{self.sockets}"


@dataclass(frozen=True)
class Fanout:
    """A contestant to load. `conversations` are those of the rooms where messages have to be stored; where there are
    none, `message` is published as it is to be sent. `processes` are those of the servers."""

    port: int
    processes: Sequence[int]
    redis_socket: str
    shape: Shape
    openings: Sequence[Opening]
    message: str
    conversations: Sequence[int] = ()
    database_url: str = ""
    seconds: float = 4.0


async def fan_out(wanted: Fanout) -> Figures:
    """At full speed, deliveries per second and what each cost the servers and this client in us of processor time;
    at an even pace, latencies in ms. Where the client costs more than the servers, or both together leave the
    processors idle, the speed is not that of the servers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return await asyncio.get_running_loop().run_in_executor(process, _drive, wanted)


def _drive(wanted: Fanout) -> Figures:
    return uvloop.run(_run(wanted))


Publish = Callable[[Sequence[int], int], Awaitable[float]]
"""Brings so many messages to each of these rooms; answers when the servers could know of them."""


async def _run(wanted: Fanout) -> Figures:
    loop = asyncio.get_running_loop()
    _, redis = await loop.create_unix_connection(_Redis, wanted.redis_socket)
    shape = wanted.shape
    sockets: list[list[_Socket]] = []
    for opening in wanted.openings:
        sockets.append([])
        for _ in range(shape.sockets):
            _, socket = await loop.create_connection(partial(_Socket, opening), "127.0.0.1", wanted.port)
            async with asyncio.timeout(PATIENCE_SECONDS):
                await socket.ready
            sockets[-1].append(socket)
    database = await asyncpg.connect(wanted.database_url) if wanted.database_url else None

    async def publish(rooms: Sequence[int], number: int) -> float:
        if database is None:
            published = time.perf_counter()
            redis.publish(LIMIT_CHANNEL, [f"{room} {wanted.message}".encode() for room in rooms] * number)
            return published
        conversations = [wanted.conversations[room] for room in rooms]
        await database.execute(_STORE, conversations, number, wanted.message)
        published = time.perf_counter()
        news = News()
        for conversation_id in conversations:
            news.changed(conversation_id)
        redis.publish(CHANNEL, [news.encode("benchmark")])
        return published

    try:
        async with asyncio.timeout(wanted.seconds * 2 + PATIENCE_SECONDS):
            speed = await _at_full_speed(wanted, sockets, publish)
            latencies = await _at_an_even_pace(wanted, sockets, publish)
    finally:
        if database is not None:
            await database.close()
    return {
        **{f"{shape}_{figure}": value for figure, value in speed.items()},
        f"{shape}_p50_ms": percentile(latencies, 0.50) * 1000,
        f"{shape}_p99_ms": percentile(latencies, 0.99) * 1000,
    }


async def _at_full_speed(wanted: Fanout, sockets: "list[list[_Socket]]", publish: Publish) -> Figures:
    rooms, batch = range(wanted.shape.rooms), wanted.shape.batch
    everyone = [socket for room in sockets for socket in room]
    began, spent, served, sent = time.perf_counter(), time.process_time(), _processor_time(wanted.processes), 0
    while time.perf_counter() - began < wanted.seconds:
        await publish(rooms, batch)
        sent += batch
        await _received(everyone, sent - (WINDOW - 1) * batch)
    await _received(everyone, sent)
    delivered = sum(socket.count for socket in everyone)
    return {
        "per_second": delivered / (time.perf_counter() - began),
        "server_us": (_processor_time(wanted.processes) - served) / delivered * 1e6,
        "client_us": (time.process_time() - spent) / delivered * 1e6,
    }


def _processor_time(processes: Sequence[int]) -> float:
    """Seconds so far, of all of them."""
    times = [psutil.Process(pid).cpu_times() for pid in processes]
    return sum(each.user + each.system for each in times)


async def _at_an_even_pace(wanted: Fanout, sockets: "list[list[_Socket]]", publish: Publish) -> list[float]:
    """Ascending, in seconds."""
    shape = wanted.shape
    # As often as a message can be stored: rooms that are due at the same moment share a batch.
    together = max(1, shape.per_second // 100)
    published: list[list[float]] = [[] for _ in sockets]
    for room in sockets:
        for socket in room:
            socket.arrivals = []
    began, turn = time.perf_counter(), 0
    while (due := began + turn * together / shape.per_second) < began + wanted.seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        due_rooms = [(turn * together + number) % shape.rooms for number in range(together)]
        moment = await publish(due_rooms, 1)
        for number in due_rooms:
            published[number].append(moment)
        turn += 1
    everyone = [(socket, moments) for room, moments in zip(sockets, published, strict=True) for socket in room]
    for socket, moments in everyone:
        await _arrived(socket, len(moments))
    return sorted(
        arrival - moment
        for socket, moments in everyone
        for arrival, moment in zip(cast(list[float], socket.arrivals), moments, strict=True)
    )


async def _received(sockets: "Sequence[_Socket]", number: int) -> None:
    for socket in sockets:
        while socket.count < number:
            await socket.more()


async def _arrived(socket: "_Socket", number: int) -> None:
    while len(cast(list[float], socket.arrivals)) < number:
        await socket.more()


class _Socket(asyncio.Protocol):
    """Counts messages; once `arrivals` is a list, it notes when they came."""

    def __init__(self, opening: Opening) -> None:
        self._opening: Final = opening
        self._upgraded = False
        self._tail = b""
        self._waiting: asyncio.Future[None] | None = None
        self.ready: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()
        self.count = 0
        self.arrivals: list[float] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._opening.request())

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        if self.ready.done():
            found = data.count(MARK)
            self.count += found
            if self.arrivals is not None:
                self.arrivals.extend([time.perf_counter()] * found)
            # What may be the beginning of a mark.
            self._tail = data[-len(MARK) + 1 :] if not data.endswith(MARK) else b""
            if found and self._waiting is not None and not self._waiting.done():
                self._waiting.set_result(None)
            return
        self._tail = data
        if not self._upgraded and b"\r\n\r\n" in data:
            if not data.startswith(b"HTTP/1.1 101"):
                self.ready.set_exception(ConnectionRefusedError(data.decode(errors="replace")))
                return
            self._upgraded = True
            self._transport.write(self._opening.first_frame())
        if self._upgraded and self._opening.ready in data:
            self._tail = b""
            self.ready.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        lost = exc or ConnectionResetError("The server closed a socket.")
        for waiting in (self.ready, self._waiting):
            if waiting is not None and not waiting.done():
                waiting.set_exception(lost)

    async def more(self) -> None:
        """Returns when more has arrived. Raises OSError when nothing will."""
        if self._transport.is_closing():
            raise ConnectionResetError("The server closed a socket.")
        self._waiting = asyncio.get_running_loop().create_future()
        await self._waiting


class _Redis(asyncio.Protocol):
    """Publishes without waiting for the answers."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def publish(self, channel: str, messages: Sequence[bytes]) -> None:
        head = b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n" % (len(channel), channel.encode())
        self._transport.write(b"".join(head + b"$%d\r\n%b\r\n" % (len(text), text) for text in messages))
