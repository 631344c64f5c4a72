"""API processes of their own, as `python -m services.api` would be; forgetful ones do not let clients resume, and
reckless ones bill without locks."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import text

from libs.domain.sessions import facts, settlement
from services.api import main
from services.api.realtime.socket import Socket
from tests.processes import until
from tests.running import SECRET
from tests.storms.forked import PROCESSES


def bill_without_locks() -> None:
    """Has this process charge what it saw, whatever others have charged meanwhile."""
    for module, name in ((facts, "_LOCKED_SESSION"), (facts, "_LOCKED_APPOINTMENT"), (settlement, "LOCK_ONE")):
        locked = str(getattr(module, name))
        assert " FOR NO KEY UPDATE" in locked
        setattr(module, name, text(locked.partition(" FOR NO KEY UPDATE")[0]))


@asynccontextmanager
async def running_process(
    database_url: str, redis_url: str, log: Path, *, forgetful: bool = False, reckless: bool = False
) -> AsyncIterator[int]:
    """The port of an API that answers."""
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
    process = PROCESSES.Process(target=_serve, args=(settings, forgetful, reckless), daemon=True)
    process.start()

    async def answers() -> bool:
        assert process.exitcode is None, f"The API ended with {process.exitcode}."
        try:
            async with httpx2.AsyncClient() as client:
                return (await client.get(f"http://127.0.0.1:{port}/healthz")).is_success
        except httpx2.TransportError:
            return False

    try:
        await until(answers)
        yield port
    finally:
        process.terminate()
        await asyncio.to_thread(process.join)
    assert process.exitcode == 0


def _serve(settings: dict[str, str], forgetful: bool, reckless: bool) -> None:
    os.environ.update(settings)
    if reckless:
        bill_without_locks()
    if forgetful:
        forget: Any = lambda *_: None  # noqa: E731
        Socket._go_back = forget  # type: ignore[method-assign]
    main.main()
