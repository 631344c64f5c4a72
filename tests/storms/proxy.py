"""A network that fails: a TCP proxy whose connections are reset, cut in the middle of a frame, or go silent."""

import asyncio
import random
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

CHUNK = 65_536
LONGEST_SILENCE = 0.5


@dataclass(eq=False)
class Line:
    """One connection through the proxy. `budget` is how many bytes it still carries before it breaks."""

    ends: tuple[StreamWriter, StreamWriter]
    silent: bool = False
    budget: int | None = None

    def reset(self) -> None:
        for end in self.ends:
            end.transport.abort()


@dataclass
class Proxy:
    """Connections to `port` go to one of the targets, each time to another."""

    targets: Sequence[int]
    port: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    _lines: set[Line] = field(default_factory=set)

    async def fail(self) -> bool:
        """Lets one connection fail in some way; false when there is none."""
        if not self._lines:
            return False
        line = random.choice(list(self._lines))
        fault = random.choice(["reset", "cut", "silence"])
        self._lines.discard(line)  # It fails once.
        match fault:
            case "reset":
                line.reset()
            case "cut":
                line.budget = random.randrange(1000)
            case "silence":
                line.silent = True
                asyncio.get_running_loop().call_later(random.uniform(0, LONGEST_SILENCE), line.reset)
        self.faults[fault] = self.faults.get(fault, 0) + 1
        return True

    async def _carry(self, reader: StreamReader, writer: StreamWriter) -> None:
        target = random.choice(self.targets)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.transport.abort()
            return
        line = Line((writer, back))
        self._lines.add(line)
        try:
            await asyncio.wait(
                [asyncio.create_task(_pump(line, reader, back)), asyncio.create_task(_pump(line, there, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._lines.discard(line)
            line.reset()


async def _pump(line: Line, reader: StreamReader, writer: StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(CHUNK):
            if line.silent:
                continue
            if line.budget is not None:
                data = data[: line.budget]
                line.budget -= len(data)
            writer.write(data)
            await writer.drain()
            if line.budget == 0:
                return


@asynccontextmanager
async def running_proxy(targets: Sequence[int]) -> AsyncIterator[Proxy]:
    proxy = Proxy(targets)
    server = await asyncio.start_server(proxy._carry, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for line in list(proxy._lines):
            line.reset()
