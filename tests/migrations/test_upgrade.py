import asyncio
import sys
from asyncio.subprocess import PIPE, STDOUT
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from alembic import command
from alembic.config import Config

from services.cli.errors import CommandError
from services.cli.migrate import MIGRATIONS, upgrade
from tests.migrations.test_schema import catalogue
from tests.population import populate

LOCK_OF_MIGRATIONS = 7_216_443_004
UPGRADE = "import sys; from services.cli.migrate import upgrade; upgrade(sys.argv[1])"


async def test_upgrading_again_changes_nothing(empty: str) -> None:
    await asyncio.to_thread(upgrade, empty)
    before = await catalogue(empty)
    connection = await asyncpg.connect(empty)
    await connection.execute("INSERT INTO tenants (name) VALUES ('Clinic')")
    await asyncio.to_thread(upgrade, empty)
    assert await catalogue(empty) == before
    assert await connection.fetchval("SELECT name FROM tenants") == "Clinic"
    await connection.close()


async def test_the_parties_of_older_appointments_are_known_after_the_upgrade(empty: str) -> None:
    config = Config(attributes={"url": empty})
    config.set_main_option("script_location", str(MIGRATIONS))
    await asyncio.to_thread(command.upgrade, config, "0001")
    connection = await asyncpg.connect(empty)
    await populate(connection, 3, datetime.now(UTC))
    await asyncio.to_thread(upgrade, empty)
    await populate(connection, 2, datetime.now(UTC))
    parties = "SELECT appointment_id, user_id FROM appointment_parties ORDER BY 1, 2"
    of_appointments = """
        SELECT id, patient_id FROM appointments UNION ALL SELECT id, doctor_id FROM appointments ORDER BY 1, 2
    """
    assert len(await connection.fetch(parties)) == 10
    assert await connection.fetch(parties) == await connection.fetch(of_appointments)
    await connection.close()


async def test_several_upgrades_at_once_all_succeed(empty: str) -> None:
    """All of them have found the database empty, and wait, when the first is let through."""
    connection = await asyncpg.connect(empty)
    await connection.execute("SELECT pg_advisory_lock($1)", LOCK_OF_MIGRATIONS)
    upgrades = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", UPGRADE, empty, stdout=PIPE, stderr=STDOUT)
        for _ in range(3)
    ]
    try:
        await _until_waiting(connection, len(upgrades))
        await connection.execute("SELECT pg_advisory_unlock($1)", LOCK_OF_MIGRATIONS)
        outputs = [(await process.communicate())[0].decode() for process in upgrades]
    finally:
        for process in upgrades:
            if process.returncode is None:
                process.kill()
    assert [process.returncode for process in upgrades] == [0, 0, 0], outputs
    assert await connection.fetchval("SELECT count(*) FROM alembic_version") == 1
    await connection.close()


async def _until_waiting(connection: "asyncpg.Connection[Any]", wanted: int) -> None:
    waiting = """
        SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
        WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()
    """
    async with asyncio.timeout(60):
        while True:
            if await connection.fetchval(waiting) == wanted:
                return
            await asyncio.sleep(0.02)


async def test_a_database_of_a_newer_version_is_left_alone(empty: str) -> None:
    await asyncio.to_thread(upgrade, empty)
    connection = await asyncpg.connect(empty)
    await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = await catalogue(empty)
    with pytest.raises(CommandError, match=r"written by a newer version of Sessiongate \(revision 9999, .* 0\d+\)"):
        await asyncio.to_thread(upgrade, empty)
    assert await catalogue(empty) == before
    assert await connection.fetchval("SELECT version_num FROM alembic_version") == "9999"
    await connection.close()


async def test_a_migration_that_fails_leaves_nothing_behind(empty: str) -> None:
    connection = await asyncpg.connect(empty)
    await connection.execute("CREATE TABLE messages (of_somebody_else text)")
    before = await catalogue(empty)
    with pytest.raises(CommandError, match="failed and was rolled back"):
        await asyncio.to_thread(upgrade, empty)
    assert await catalogue(empty) == before
    await connection.execute("DROP TABLE messages")
    await asyncio.to_thread(upgrade, empty)
    await connection.close()


def test_a_database_that_cannot_be_reached_is_said_in_a_sentence() -> None:
    with pytest.raises(CommandError, match="cannot be reached"):
        upgrade("postgresql://nobody@/nothing?host=/nonexistent")
