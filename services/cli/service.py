"""A service of ours as a child process: started, awaited, and started again whenever it ends."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from services.cli import processes
from services.cli.errors import CommandError
from services.cli.home import Lock
from services.cli.processes import Stopping

READY_TIMEOUT_SECONDS: Final = 60.0
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 10.0
HEALTHY_SECONDS: Final = 30.0
"""A service that lived so long starts its pauses anew."""

# With what the servers get (see embedded.py), less than 20 s.
_STOP: Final[Stopping] = ((signal.SIGTERM, 13.0),)


@dataclass
class Service:
    """`python -m module`, configured by the environment and logging to `log`; ready when `url` answers."""

    name: str
    module: str
    url: str
    log: Path
    lock: Lock
    pid: int = 0
    is_ready: bool = False

    async def run(self, on_restart: Callable[[], None]) -> None:
        """Keeps the service running until cancelled, and stops it then.

        Raises `CommandError` when it ends before it was ever ready: it would do so again.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            started = time.monotonic()
            process = await processes.start(
                [sys.executable, "-m", self.module], env=os.environ | {"SESSIONGATE_LOG_FILE": str(self.log)}
            )
            self.pid = process.pid
            self.lock.add(process.pid)
            if self.is_ready:
                on_restart()
            try:
                await process.wait()
            finally:
                await processes.stop(process, _STOP)
            if not self.is_ready:
                raise CommandError(
                    f"The {self.name} did not start ({processes.ending(process)}); its log is {self.log}."
                )
            if time.monotonic() - started > HEALTHY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            say(f"The {self.name} has ended ({processes.ending(process)}); starting it again in {pause:g} s.")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def ready(self) -> None:
        """Returns when the service answers. Raises `CommandError` when that takes too long."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_SECONDS):
                while not await _answers(self.url):  # noqa: ASYNC110 no event tells
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise CommandError(
                f"The {self.name} is not ready after {READY_TIMEOUT_SECONDS:g} s; its log is {self.log}."
            ) from None
        self.is_ready = True


def say(line: str) -> None:
    """Tells the person at the terminal, who may be gone."""
    with suppress(OSError):
        print(line, flush=True)


async def _answers(url: str) -> bool:
    """Whether something answers there, other than that it is in trouble."""
    address = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
    except OSError:
        return False
    try:
        writer.write(f"GET {address.path} HTTP/1.0\r\nHost: {address.netloc}\r\n\r\n".encode())
        status = (await reader.readline()).split()[1:2]
        return bool(status) and status[0] < b"500"
    except OSError:
        return False
    finally:
        writer.close()
