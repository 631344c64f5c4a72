"""Bringing the schema up to date."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from services.cli.embedded import OWNER, Servers
from services.cli.errors import CommandError
from services.cli.migrate import MIGRATIONS, known_revisions, upgrade
from tests.cli.conftest import CLEAN, SESSIONGATE, sessiongate


@pytest.fixture
async def empty(servers: Servers) -> AsyncIterator[str]:
    """The owner's address of a database in which there is nothing."""
    url = servers.database_url(OWNER)
    administration = await asyncpg.connect(url.replace("/sessiongate?", "/postgres?"))
    await administration.execute("CREATE DATABASE empty")
    yield url.replace("/sessiongate?", "/empty?")
    await administration.execute("DROP DATABASE empty WITH (FORCE)")
    await administration.close()


def configuration(url: str) -> Config:
    config = Config(attributes={"url": url})
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def test_the_file_names_tell_the_revisions_in_order() -> None:
    revisions = ScriptDirectory.from_config(configuration("")).walk_revisions()
    assert known_revisions() == [script.revision for script in revisions][::-1]


async def test_the_migrations_and_the_tables_agree(empty: str) -> None:
    await asyncio.to_thread(upgrade, empty)
    await asyncio.to_thread(command.check, configuration(empty))


def test_two_at_once_make_one_schema(empty: str, tmp_path: Path) -> None:
    env = CLEAN | {"SESSIONGATE_DATABASE_URL": empty.replace("postgresql://", "postgresql+asyncpg://")}
    both = [subprocess.Popen([SESSIONGATE, "migrate"], cwd=tmp_path, env=env) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]


async def test_a_database_of_a_newer_version_is_left_alone(empty: str, tmp_path: Path) -> None:
    connection = await asyncpg.connect(empty)
    await connection.execute("CREATE TABLE alembic_version AS SELECT '9999' AS version_num")
    with pytest.raises(CommandError, match="written by a newer version of Sessiongate \\(revision 9999"):
        await asyncio.to_thread(upgrade, empty)
    refused = await asyncio.to_thread(sessiongate, tmp_path, "migrate", env={"SESSIONGATE_DATABASE_URL": empty})
    assert refused.returncode == 1
    assert refused.stderr.startswith("The database was written by a newer version")
    assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 1
    await connection.close()


def test_a_schema_that_is_up_to_date_costs_no_heavy_imports(empty: str, tmp_path: Path) -> None:
    upgrade(empty)
    script = "import sys; from services.cli.migrate import upgrade; upgrade(sys.argv[1]); print(*sys.modules)"
    again = subprocess.run(
        [sys.executable, "-c", script, empty], capture_output=True, text=True, timeout=30, cwd=tmp_path
    )
    assert "services.cli.migrate" in again.stdout.split()
    assert "alembic" not in again.stdout.split()


def test_an_unreachable_database_is_one_sentence(tmp_path: Path) -> None:
    url = "postgresql://sessiongate_owner@127.0.0.1:1/sessiongate"
    refused = sessiongate(tmp_path, "migrate", env={"SESSIONGATE_DATABASE_URL": url})
    assert refused.returncode == 1
    assert refused.stderr.startswith("The database cannot be reached: ")
    assert refused.stderr.count("\n") == 1
