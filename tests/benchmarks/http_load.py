"""A load client that costs little: prepared bytes out, as little as possible looked at of what comes back.

`load` runs it in a process of its own, so that its garbage collector and event loop are nobody else's. Each
connection sends its next request as soon as the last one is answered.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count, cycle
from typing import Final, cast

import uvloop

from tests.benchmarks.harness import Figures, percentile
from tests.processes import PATIENCE_SECONDS

_LENGTH: Final = b"content-length: "
_END_OF_HEAD: Final = b"\r\n\r\n"


class UnexpectedAnswerError(Exception):
    """Something else than what was expected; tells the answer."""


@dataclass(frozen=True)
class Request:
    """The bytes of a request before and after a number of `Request.DIGITS` digits, which is never the same twice;
    `after` is None when it holds no number."""

    before: bytes
    after: bytes | None

    DIGITS = 12

    @classmethod
    def post(cls, path: str, body: bytes, token: str | None = None) -> "Request":
        """`body` holds the number's place as `%d`, if anywhere."""
        before, found, after = body.partition(b"%d")
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        if token:
            head += f"Authorization: Bearer {token}\r\n"
        length = len(before) + len(after) + (cls.DIGITS if found else 0)
        head += f"Content-Length: {length}\r\n\r\n"
        return cls(head.encode() + before, after if found else None)

    def numbered(self, number: int) -> bytes:
        if self.after is None:
            return self.before
        return b"%b%0*d%b" % (self.before, self.DIGITS, number, self.after)


@dataclass(frozen=True)
class Load:
    """What to send, and for how long; what is answered while warming up is not counted."""

    port: int
    requests: Sequence[Request]
    status: int = 201
    connections: int = 16
    warm_up_seconds: float = 2.0
    seconds: float = 8.0


@dataclass(frozen=True)
class Once:
    """Each request is sent once, since it has its effect once; the first ones, so many, are not counted."""

    port: int
    requests: Sequence[Request]
    status: int = 200
    connections: int = 16
    warm_up: int = 0


async def load(wanted: Load | Once) -> Figures:
    """Requests per second, latencies in ms, and the client's own processor time per request in us. Raises
    an ExceptionGroup of `UnexpectedAnswerError` when a request is answered with another status than wanted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return await asyncio.get_running_loop().run_in_executor(process, _drive, wanted)


def _drive(wanted: Load | Once) -> Figures:
    return uvloop.run(_Drive(wanted).run())


class _Drive:
    """One run of the load."""

    def __init__(self, wanted: Load | Once) -> None:
        self._wanted: Final = wanted
        self.expected: Final = b"%d" % wanted.status
        self._numbers: Final = count(time.time_ns() // 1000 % 10**Request.DIGITS)  # beyond those of an earlier run
        self._requests: Final = iter(wanted.requests) if isinstance(wanted, Once) else cycle(wanted.requests)
        self._warm_up = wanted.warm_up if isinstance(wanted, Once) else 0
        self.counting = False
        self.ending = False
        self.latencies: Final[list[float]] = []

    async def run(self) -> Figures:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10 * PATIENCE_SECONDS), asyncio.TaskGroup() as connections:
            for _ in range(self._wanted.connections):
                _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self._wanted.port)
                connections.create_task(connection.closed())
            if isinstance(self._wanted, Load):
                await asyncio.sleep(self._wanted.warm_up_seconds)
                self._count()
                await asyncio.sleep(self._wanted.seconds)
                self._stop_counting()
        if isinstance(self._wanted, Once):
            self._stop_counting()
        took, spent = self._took, self._spent
        self.latencies.sort()
        return {
            "per_second": len(self.latencies) / took,
            "p50_ms": percentile(self.latencies, 0.50) * 1000,
            "p99_ms": percentile(self.latencies, 0.99) * 1000,
            "client_us": spent / len(self.latencies) * 1e6,
        }

    def _count(self) -> None:
        self.counting, self._began, self._spent = True, time.perf_counter(), time.process_time()

    def _stop_counting(self) -> None:
        self.counting, self.ending = False, True
        self._took, self._spent = time.perf_counter() - self._began, time.process_time() - self._spent

    def next_request(self) -> bytes | None:
        """None when there are no more."""
        if self.ending or (request := next(self._requests, None)) is None:
            return None
        if isinstance(self._wanted, Once) and not self.counting:
            if self._warm_up == 0:
                self._count()
            self._warm_up -= 1
        return request.numbered(next(self._numbers))


class _Connection(asyncio.Protocol):
    """A keep-alive connection. Reads the status, the length, and nothing else of an answer."""

    def __init__(self, drive: _Drive) -> None:
        self._drive: Final = drive
        self._received = b""
        self._closed: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()

    async def closed(self) -> None:
        """Raises `UnexpectedAnswerError`, and OSError when the server closed it."""
        await self._closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        request = self._drive.next_request()
        if request is None:
            self._closed.set_result(None)
            self._transport.close()
            return
        self._began = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        received = self._received + data
        end = received.find(_END_OF_HEAD)
        if end >= 0:
            at = received.index(_LENGTH, 0, end) + len(_LENGTH)
            length = int(received[at : received.index(b"\r\n", at)])
            if len(received) >= end + len(_END_OF_HEAD) + length:
                self._received = b""
                self._answered(received)
                return
        self._received = received

    def _answered(self, answer: bytes) -> None:
        if self._drive.counting:
            self._drive.latencies.append(time.perf_counter() - self._began)
        if answer[9:12] != self._drive.expected:
            self._closed.set_exception(UnexpectedAnswerError(answer.decode(errors="replace")))
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_exception(exc or ConnectionResetError("The server closed the connection."))
