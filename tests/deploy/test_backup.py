"""The copy of the database that deploy/README.md tells to make, and how it comes back."""

import asyncio
import re
from pathlib import Path

import asyncpg

from services.cli.embedded import Servers
from tests.deploy.files import DEPLOY
from tests.servers import copy_of, url_of


def options(program: str) -> list[str]:
    """What the page calls a program with, but for who connects to what."""
    (called,) = re.findall(
        rf"^ +{program} (.*) [<>] sessiongate\.dump$", (DEPLOY / "README.md").read_text(), re.MULTILINE
    )
    return [option for option in called.split() if not option.startswith(("--username=", "--dbname="))]


async def test_what_was_copied_comes_back_into_a_database_that_has_something_else(
    servers: Servers, migrated: str, tmp_path: Path
) -> None:
    async with copy_of(servers, migrated, "backed_up") as name:
        url, dump = url_of(servers, name), tmp_path / "sessiongate.dump"

        async def tenants(change: str) -> list[str]:
            connection = await asyncpg.connect(url)
            try:
                await connection.execute(change)
                return [row["name"] for row in await connection.fetch("SELECT name FROM tenants ORDER BY id")]
            finally:
                await connection.close()

        async def run(program: str, file: str | Path) -> None:
            command = (servers.postgres_bin / program, f"--dbname={url}", *options(program), file)
            assert await (await asyncio.create_subprocess_exec(*command)).wait() == 0

        before = await tenants("INSERT INTO tenants (name) VALUES ('My clinic')")
        await run("pg_dump", f"--file={dump}")
        assert await tenants("UPDATE tenants SET name = 'Another'") != before
        await run("pg_restore", dump)
        assert await tenants("SELECT") == before
