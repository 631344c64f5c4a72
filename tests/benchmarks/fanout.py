"""Messages told to sockets per second: by an API process as in production, beside a bare protocol that encodes each
frame once, and beside socket.io with its Redis adapter.

The messages come from another process, as they do with several API processes. What it costs to store one is measured
by `send`; here the benchmark stores them in batches, and the product reads them from PostgreSQL as it always does.
The others get the text that the product sends, through Redis.
"""

import asyncio
import shutil
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from services.cli.embedded import DATABASE, LOGIN
from tests.benchmarks.fanout_load import Fanout, Opening, Shape, fan_out
from tests.benchmarks.harness import Figures, Result, console, fresh_copy, interleaved, named, speeds
from tests.benchmarks.send import BODY, Room, open_rooms
from tests.processes import free_port, running_api_process, until
from tests.running import token_of
from tests.servers import migrate, running_servers, url_of

SHAPES: Final = (Shape(rooms=1, sockets=200, batch=50, per_second=100), Shape(100, 2, batch=1, per_second=1000))
MODULES: Final = Path(".bench/node")
PACKAGES: Final = ("socket.io@4", "@socket.io/redis-adapter@8", "redis@4")

_SERVER: Final = Path(__file__).with_name("socketio.mjs")

# As the product says it.
_MESSAGE: Final = (
    '{"type":"message","message":{"id":1234567,"seq":1234,"client_message_id":"1234","sender":{"id":781,"role":'
    f'"patient"}},"kind":"text","body":"{BODY}","media_url":null,"reply_to":null,"reactions":[],'
    '"sent_at":"2026-01-02T03:04:05.678901Z"}}'
)


async def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        async with running_servers(durable=True) as servers:
            await migrate(servers)
            rooms = await open_rooms(url_of(servers, DATABASE), max(shape.rooms for shape in SHAPES))
            redis_socket = str(servers.run / "redis.sock")

            async def product() -> Figures:
                async def measure(shape: Shape) -> Figures:
                    async with (
                        fresh_copy(servers, DATABASE) as name,
                        running_api_process(
                            url_of(servers, name, LOGIN),
                            servers.redis_url,
                            Path(folder) / f"{name}.jsonl",
                            SESSIONGATE_SOCKETS_PER_USER=str(shape.sockets),
                        ) as api,
                    ):
                        joined = rooms[: shape.rooms]
                        openings = [_to_the_product(room) for room in joined]
                        conversations = [room.conversation_id for room in joined]
                        database_url = url_of(servers, name, LOGIN)
                        return await fan_out(
                            Fanout(
                                api.port,
                                [api.process.pid],
                                redis_socket,
                                shape,
                                openings,
                                BODY,
                                conversations,
                                database_url,
                            )
                        )

                return await _all_shapes(measure)

            async def limit() -> Figures:
                async def measure(shape: Shape) -> Figures:
                    port = free_port()
                    command = [sys.executable, "-m", "tests.benchmarks.fanout_limit", str(port), redis_socket]
                    async with _running(command) as server:
                        await until(lambda: _listens(port))
                        openings = [Opening(f"/{number}") for number in range(shape.rooms)]
                        return await fan_out(Fanout(port, [server.pid], redis_socket, shape, openings, _MESSAGE))

                return await _all_shapes(measure)

            async def socketio() -> Figures:
                async def measure(shape: Shape) -> Figures:
                    port = free_port()
                    async with (
                        _running(["node", str(_SERVER), str(port), redis_socket], cwd=MODULES, ready=True) as server,
                        _running(["node", str(_SERVER), "ingest", redis_socket], cwd=MODULES, ready=True) as ingest,
                    ):
                        openings = [_to_socketio(number) for number in range(shape.rooms)]
                        return await fan_out(
                            Fanout(port, [server.pid, ingest.pid], redis_socket, shape, openings, _MESSAGE)
                        )

                return await _all_shapes(measure)

            contestants = {"product": product, "limit": limit}
            if await _has_socketio():
                contestants["socketio"] = socketio
            figures = await interleaved(contestants)
    others = [name for name in contestants if name != "product"]
    large, small = (speeds(figures, "product", *others, figure=f"{shape}_per_second") for shape in SHAPES)
    return Result(
        figures=named(figures),
        ratios={**large, **{f"{other}_{SHAPES[1]}": ratio for other, ratio in small.items()}},
        # The limit of many small rooms is no goal: to store the messages alone takes half of the time it leaves.
        goals={"limit": "0.3, goal 0.55", "socketio": "0.5, goal 1", f"socketio_{SHAPES[1]}": "0.5"},
    )


async def _all_shapes(measure: Callable[[Shape], Awaitable[Figures]]) -> Figures:
    figures: Figures = {}
    for shape in SHAPES:
        figures |= await measure(shape)
    return figures


def _to_the_product(room: Room) -> Opening:
    headers = f"Authorization: Bearer {token_of(room.patient)}\r\nSec-WebSocket-Protocol: sessiongate.v1\r\n"
    return Opening(f"/api/v1/chat/{room.context}/socket", headers, '{"type":"hello"}', b'"caught_up"')


def _to_socketio(number: int) -> Opening:
    return Opening(f"/socket.io/?EIO=4&transport=websocket&room={number}", hello="40", ready=b'40{"sid"')


async def _has_socketio() -> bool:
    """Whether Node and the packages are there, or could be installed. Says what is missing."""
    if not (shutil.which("node") and shutil.which("npm")):
        console.print("  socketio is left out: there is no node, or no npm")
        return False
    if not (MODULES / "node_modules/socket.io").exists():
        MODULES.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(MODULES), *PACKAGES]
        installing = await asyncio.create_subprocess_exec(*command)
        if await installing.wait() != 0:
            console.print("  socketio is left out: npm cannot install it")
            return False
    return True


@asynccontextmanager
async def _running(command: Sequence[str], *, cwd: Path | None = None, ready: bool = False) -> AsyncIterator[Process]:
    """A process; with `ready`, one that has said so."""
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd, stdout=PIPE if ready else None)
    try:
        if process.stdout is not None:
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
