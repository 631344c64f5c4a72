"""PostgreSQL and Redis from wheels."""

import os
import shutil
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from arq import create_pool, func
from arq.connections import RedisSettings
from arq.worker import Worker
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from services.cli import embedded
from services.cli.embedded import OWNER, Servers
from services.cli.home import Home
from tests.cli.conftest import mode


@pytest.mark.parametrize("name", ["home", "long" * 30])
@pytest.mark.parametrize("permissions", [0o711, 0o700])
async def test_both_start_and_stop_wherever_home_is(folder: Path, name: str, permissions: int) -> None:
    home = Home(folder / name)
    home.create()
    os.chmod(folder, permissions)
    with home.lock() as lock, embedded.prepare(home, lock) as servers:
        async with servers.postgres() as postgres, servers.redis() as redis:
            connection = await asyncpg.connect(servers.database_url(OWNER))
            shown = await connection.fetchrow(
                "SELECT current_setting('listen_addresses') AS addresses, current_setting('fsync') AS fsync,"
                " current_setting('server_encoding') AS encoding, pg_get_userbyid(datdba) AS owner"
                " FROM pg_database WHERE datname = current_database()"
            )
            await connection.close()
            assert shown
            assert dict(shown) == {"addresses": "", "fsync": "on", "encoding": "UTF8", "owner": OWNER}
            assert mode(servers.run) == 0o700
            assert psutil.Process(postgres.pid).username() != "root"
            assert psutil.Process(redis.pid).net_connections("inet") == []
        assert (postgres.returncode, redis.returncode) == (0, 0)
    assert not servers.run.exists()
    for data in (home.path / "postgres", home.path / "redis"):
        # Root's servers run as another user, whose data cannot be in a closed folder.
        assert data.is_symlink() == (os.geteuid() == 0 and permissions == 0o700)
        shutil.rmtree(data.resolve())


async def test_redis_refuses_scripts_and_administration(servers: Servers) -> None:
    client = Redis.from_url(servers.redis_url)
    for command in ("EVAL 0 0", "FLUSHALL", "CONFIG GET *", "SHUTDOWN", "DEBUG SLEEP 0"):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*command.split())
    await client.aclose()


async def test_arq_works_with_what_redis_allows(servers: Servers) -> None:
    done: list[int] = []

    async def job(ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> None:
        done.extend(args)

    redis = await create_pool(RedisSettings(unix_socket_path=servers.redis_url.removeprefix("unix://")))
    queue = "arq:test_embedded"
    await redis.enqueue_job("job", 7, _queue_name=queue)
    worker = Worker([func(job, name="job")], queue_name=queue, redis_pool=redis, burst=True, handle_signals=False)
    await worker.async_run()
    assert done == [7]
    await redis.aclose()
