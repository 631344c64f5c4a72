"""A clock that tests can move: everything that asks for the present time asks the function `clock()`."""

from datetime import timedelta
from typing import Any

import asyncpg

CLOCK_OF_TESTS = """
    CREATE TABLE test_clock (ahead interval NOT NULL);
    INSERT INTO test_clock VALUES ('0');
    GRANT SELECT ON test_clock TO PUBLIC;
    CREATE OR REPLACE FUNCTION clock() RETURNS timestamptz LANGUAGE sql STABLE
        AS 'SELECT now() + ahead FROM test_clock';
"""


class Clock:
    """The clock of one test's database."""

    def __init__(self, owner: "asyncpg.Connection[Any]") -> None:
        self._owner = owner

    async def advance(self, by: timedelta) -> None:
        await self._owner.execute("UPDATE test_clock SET ahead = ahead + $1", by)
