import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from libs.domain.tables import metadata
from services.cli.migrate import upgrade
from tests.migrations.conftest import MakeDatabase

CLOCK = "CREATE FUNCTION clock() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT now()'"

CATALOGUE = """
    SELECT 'column ' || attrelid::regclass || '.' || attname, format_type(atttypid, atttypmod)
        || CASE WHEN attnotnull THEN ' not null' ELSE '' END || ' identity ' || attidentity::text
        || ' default ' || coalesce(pg_get_expr(adbin, adrelid), '')
    FROM pg_attribute
        JOIN pg_class ON pg_class.oid = attrelid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT 'constraint ' || conrelid::regclass || '.' || conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND conrelid <> 0 AND contype <> 't'
    UNION ALL
    SELECT 'index ' || indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL
    SELECT 'table ' || relname, coalesce(array_to_string(reloptions, ', '), '') FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""
"""Every table, column, constraint and index, and what it is exactly. Alembic compares no CHECKs, no exclusion
constraints and no storage parameters."""


async def catalogue(url: str) -> dict[str, str]:
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(CATALOGUE)
    await connection.close()
    return {name: definition for name, definition in rows if "alembic_version" not in name}


@asynccontextmanager
async def connected(url: str) -> AsyncIterator["Callable[[Callable[[Connection], Any]], Any]"]:
    """Runs synchronous SQLAlchemy code on a connection, and commits."""
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url), poolclass=NullPool
    )
    async with engine.begin() as connection:
        yield connection.run_sync


async def test_the_migrations_make_the_schema_that_the_code_declares(empty: str) -> None:
    await asyncio.to_thread(upgrade, empty)

    def difference(connection: Connection) -> Any:
        options = {"compare_type": True, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    async with connected(empty) as run:
        assert await run(difference) == []


async def test_the_migrations_make_the_very_tables_that_the_code_declares(make_empty: MakeDatabase) -> None:
    migrated, declared = await make_empty(), await make_empty()
    await asyncio.to_thread(upgrade, migrated)
    async with connected(declared) as run:
        await run(lambda connection: connection.exec_driver_sql(CLOCK))
        await run(metadata.create_all)
    assert await catalogue(migrated) == await catalogue(declared)
    assert "constraint busy_intervals.busy_intervals_no_overlap" in await catalogue(declared)
