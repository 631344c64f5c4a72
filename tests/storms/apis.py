"""API processes of their own, as `python -m services.api` would be, or with something taken out of them."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import text

from libs.domain.sessions import facts, settlement
from libs.domain.transaction import Bell, Transaction
from services.api import main
from services.api.realtime.socket import Socket
from tests.processes import until
from tests.running import SECRET
from tests.storms.forked import PROCESSES

Sabotage = Callable[[], None]
"""Breaks the process that calls it."""


@dataclass(frozen=True, eq=False)
class Api:
    """An API process and its port."""

    process: BaseProcess
    port: int

    async def answers(self) -> bool:
        assert self.process.exitcode is None, f"The API ended with {self.process.exitcode}."
        try:
            async with httpx2.AsyncClient() as client:
                return (await client.get(f"http://127.0.0.1:{self.port}/healthz")).is_success
        except httpx2.TransportError:
            return False

    async def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        await asyncio.to_thread(self.process.join)


def start(database_url: str, redis_url: str, log: Path, sabotage: Sabotage | None = None) -> Api:
    """Starts an API, which takes a moment until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    settings = {
        "SESSIONGATE_DATABASE_URL": database_url,
        "SESSIONGATE_REDIS_URL": redis_url,
        "SESSIONGATE_JWT_SECRET": SECRET,
        "SESSIONGATE_API_PORT": str(port),
        "SESSIONGATE_CHAT_MESSAGES_PER_MINUTE": "10000000",
        "SESSIONGATE_SOCKETS_PER_USER": "100",
        "SESSIONGATE_LOG_FILE": str(log),
    }
    process = PROCESSES.Process(target=_serve, args=(settings, sabotage), daemon=True)
    process.start()
    return Api(process, port)


@asynccontextmanager
async def running_process(
    database_url: str, redis_url: str, log: Path, sabotage: Sabotage | None = None
) -> AsyncIterator[int]:
    """The port of an API that answers."""
    api = start(database_url, redis_url, log, sabotage)
    try:
        await until(api.answers)
        yield api.port
    finally:
        api.process.terminate()
        await asyncio.to_thread(api.process.join)
    assert api.process.exitcode == 0


def _serve(settings: dict[str, str], sabotage: Sabotage | None) -> None:
    os.environ.update(settings)
    if sabotage is not None:
        sabotage()
    main.main()


def let_nobody_resume() -> None:
    """Forgets what a client that comes back has missed."""
    forget: Any = lambda *_: None  # noqa: E731
    Socket._go_back = forget  # type: ignore[method-assign]


def bill_without_locks() -> None:
    """Charges what it saw, whatever others have charged meanwhile."""
    for module, name in ((facts, "_LOCKED_SESSION"), (facts, "_LOCKED_APPOINTMENT"), (settlement, "LOCK_ONE")):
        locked = str(getattr(module, name))
        assert " FOR NO KEY UPDATE" in locked
        setattr(module, name, text(locked.partition(" FOR NO KEY UPDATE")[0]))


def answer_before_commit() -> None:
    """Commits a moment after the answer."""
    commit, close = Transaction.commit, Transaction.close
    committing: dict[Transaction, asyncio.Task[None]] = {}

    async def commit_later(self: Transaction, bell: Bell) -> None:
        async def work() -> None:
            await asyncio.sleep(0.05)
            await commit(self, bell)
            await close(self)
            del committing[self]

        committing[self] = asyncio.create_task(work())

    async def close_otherwise(self: Transaction) -> None:
        if self not in committing:
            await close(self)

    Transaction.commit = commit_later  # type: ignore[method-assign]
    Transaction.close = close_otherwise  # type: ignore[method-assign]
