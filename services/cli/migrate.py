"""Brings the schema of a database up to date."""

import asyncio
from pathlib import Path
from typing import Final

import asyncpg
import typer

from libs.domain.settings import DatabaseSettings, libpq_dsn
from services.cli import home
from services.cli.errors import CommandError

MIGRATIONS: Final = Path(__file__).parents[2] / "migrations"


def upgrade(url: str) -> None:
    """Applies the migrations that the database lacks. Safe to run by several processes at once.

    `url` names the role that owns the schema. Raises `CommandError`; what a failed migration had
    begun is rolled back.
    """
    dsn = libpq_dsn(url)
    known = known_revisions()
    stored = asyncio.run(_stored_revision(dsn))
    if stored is not None and stored not in known:
        raise CommandError(
            f"The database was written by a newer version of Sessiongate (revision {stored}, this one knows"
            f" {known[-1]}). Nothing was changed; install the newer version."
        )
    if stored == known[-1]:
        return
    # Here, because most starts find nothing to do and need not wait for these imports.
    from alembic import command
    from alembic.config import Config
    from sqlalchemy.exc import DBAPIError

    config = Config(attributes={"url": dsn})
    config.set_main_option("script_location", str(MIGRATIONS))
    try:
        command.upgrade(config, "head")
    except DBAPIError as error:
        raise CommandError(f"The migration failed and was rolled back: {error.orig}") from error


def known_revisions() -> list[str]:
    """In order. File names begin with the revision, which counts up (`alembic revision --rev-id`)."""
    return sorted(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


async def _stored_revision(dsn: str) -> str | None:
    try:
        connection = await asyncpg.connect(dsn, timeout=10)
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        raise CommandError(f"The database cannot be reached: {error or 'timed out'}.") from error
    try:
        revision: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
    except asyncpg.UndefinedTableError:
        return None
    finally:
        await connection.close()
    return revision


def migrate() -> None:
    """Bring the schema of the database up to date."""
    settings = home.settings(DatabaseSettings)
    upgrade(settings.migrations_database_url or settings.database_url)
    typer.echo("The schema is up to date.")
