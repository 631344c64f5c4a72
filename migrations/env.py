"""How Alembic reaches the database and what it compares it with.

The address comes from the caller (`services.cli.migrate`) or, under the `alembic` command, from the
settings.
"""

import asyncio

import asyncpg
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from libs.domain.settings import DatabaseSettings, libpq_dsn, load
from libs.domain.tables import metadata

# Held by one migrating process at a time; the others wait, and then find nothing left to do.
ADVISORY_LOCK = 7_216_443_004
# A migration that cannot get its lock soon gives up instead of holding up every query behind it.
LOCK_TIMEOUT = "5s"
STATEMENT_TIMEOUT = "10min"


def migrate(connection: Connection) -> None:
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"))
    connection.commit()
    context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()


async def run(url: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url), poolclass=NullPool
    )
    async with engine.connect() as connection:
        await connection.run_sync(migrate)


def configured_url() -> str:
    settings = load(DatabaseSettings)
    return libpq_dsn(settings.migrations_database_url or settings.database_url)


asyncio.run(run(context.config.attributes.get("url") or configured_url()))
