"""A server that takes webhooks: it remembers what it got, and answers as it is told."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from libs.domain.db import Database
from libs.domain.sealing import FieldKeys
from libs.domain.transaction import transaction
from libs.domain.webhooks import endpoints
from libs.guardrails import Principal
from tests.clinic import RecordingBell


@dataclass(frozen=True)
class Received:
    """One request; `body` as it was sent."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def told(self) -> Any:
        return orjson.loads(self.body)


@dataclass
class Receiver:
    """`answers` are statuses by path, each for one request, the last for all that follow; 204 where nothing is said.
    Requests to a path in `hanging` get no answer."""

    url: str
    got: list[Received] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hanging: set[str] = field(default_factory=set)
    connections: int = 0

    def at(self, path: str) -> list[Received]:
        return [received for received in self.got if received.path == path]

    def answer(self, path: str) -> bytes:
        statuses = self.answers.get(path, [204])
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        headers = {"Content-Length": str(len(self.body)), **self.headers}
        lines = [f"HTTP/1.1 {status} .", *(f"{name}: {value}" for name, value in headers.items()), "\r\n"]
        return "\r\n".join(lines).encode() + self.body


@asynccontextmanager
async def receiving(
    host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """A receiver at an address of this machine."""
    receiver = Receiver("")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        receiver.connections += 1
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:  # as long as the other side keeps the connection
                head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
                path = head.split()[1]
                received = Received(path, headers, await reader.readexactly(int(headers["content-length"])))
                receiver.got.append(received)
                if path in receiver.hanging:
                    await reader.read()  # until the other side is tired of waiting
                writer.write(receiver.answer(path))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, host, port, ssl=tls)
    bound = server.sockets[0].getsockname()[1]
    receiver.url = f"{'https' if tls else 'http'}://{host}:{bound}"
    try:
        yield receiver
    finally:
        server.close()


async def register(
    database: Database, operator: Principal, url: str, *events: str, keys: FieldKeys | None = None
) -> tuple[int, str]:
    """Registers an endpoint, at whatever address; its id and its secret."""
    async with transaction(database, RecordingBell()) as tx:
        endpoint, secret = await endpoints.register(
            tx, operator, keys or FieldKeys({}), url=url, description=None, events=events or endpoints.DEFAULT
        )
    return endpoint.id, secret
