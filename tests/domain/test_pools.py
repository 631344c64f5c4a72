"""The pools of a process: what is told of them."""

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout

from libs.domain.db import Database
from tests.clinic import Clinic
from tests.conftest import Urls


async def test_whoever_waits_in_vain_for_a_connection_of_either_pool_is_counted(
    clinic: Clinic, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.domain.db.POOL_TIMEOUT", 0.1)
    database = Database(urls.app, application="tests", pool_size=1).observed(clinic.metrics, "worker")

    def counted() -> float:
        return clinic.metrics.sample("db_pool_timeouts_total", pool="worker")

    async with database.begin():
        with pytest.raises(PoolTimeout):
            async with database.begin():
                raise AssertionError("There is but one connection.")
        with pytest.raises(PoolTimeout):
            await database.connect()
        async with database.autocommit() as connection:
            with pytest.raises(TimeoutError):
                async with database.autocommit():
                    raise AssertionError("There is but one connection.")
            assert counted() == 3
            assert await connection.fetchval("SELECT 1") == 1

    for lend in (database.begin, database.autocommit):
        with pytest.raises(TimeoutError):
            async with lend():
                raise TimeoutError("What takes long once it has a connection is something else.")
    assert counted() == 3
    assert database.in_use() == 0
    await database.close()
