"""The database of a command."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from libs.domain.db import WORKER_TIMEOUTS, Database
from libs.domain.settings import DatabaseSettings, libpq_dsn


@asynccontextmanager
async def opened(settings: DatabaseSettings) -> AsyncIterator[Database]:
    """For commands that may take as long as background work."""
    database = Database(
        libpq_dsn(settings.database_url),
        application="sessiongate-cli",
        pool_size=2,
        command_timeout=35.0,
        timeouts=WORKER_TIMEOUTS,
    )
    try:
        yield database
    finally:
        await database.close()
