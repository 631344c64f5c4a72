"""Whether conversion stays as fast when the table of appointments has grown."""

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import asyncpg

from services.cli.embedded import DATABASE
from tests.benchmarks.conversion import measure_product
from tests.benchmarks.harness import Figures, Result, interleaved, named, speeds
from tests.population import age, populate, settle
from tests.servers import copy_of, migrate, running_servers, url_of

APPOINTMENTS: Final = 5_000
CROWD: Final = 20
OTHERS: Final = 1_000_000
"""Ten for each of the patients and doctors, one in `CROWD` of whom has an appointment that is due."""


async def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        async with running_servers(durable=True) as servers:
            await migrate(servers)
            connection = await asyncpg.connect(url_of(servers, DATABASE))
            await populate(connection, APPOINTMENTS, datetime.now(UTC) - timedelta(minutes=1), crowd=CROWD)
            await settle(connection)
            await connection.close()
            async with copy_of(servers, DATABASE, "grown") as grown:
                connection = await asyncpg.connect(url_of(servers, grown))
                await age(connection, OTHERS)
                await settle(connection)
                await connection.close()

                async def small() -> Figures:
                    return {"per_second": await measure_product(servers, DATABASE, Path(folder))}

                async def large() -> Figures:
                    return {"per_second": await measure_product(servers, grown, Path(folder))}

                figures = await interleaved({"small": small, "large": large})
    return Result(
        figures=named(figures),
        # Time with a million other appointments, in units of the time without.
        ratios={"one_million": speeds(figures, "small", "large")["large"]},
        goals={"one_million": "at most 1.2"},
    )
