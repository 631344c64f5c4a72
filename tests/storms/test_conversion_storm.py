"""Whatever dies, when, and how often: every convertible appointment becomes one session."""

from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.conftest import Urls
from tests.storms.storm import Scale, Storm, faults

LONG = Scale(appointments=4000, seconds=20.0, kills=60)
SHORT = Scale(appointments=800, seconds=4.0, kills=12)

# In this order, because the foreign key to sessions is bound to one of them.
WITHOUT_UNIQUENESS = """
    ALTER TABLE appointments DROP CONSTRAINT appointments_session_id_id_fkey;
    ALTER TABLE sessions DROP CONSTRAINT sessions_appointment_id_key;
    DROP INDEX sessions_live_patient_key, sessions_live_doctor_key;
"""


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    return LONG if request.config.getoption("--storm") == "full" else SHORT


async def test_every_due_appointment_becomes_one_session(
    urls: Urls, owner: "asyncpg.Connection[Any]", tmp_path: Path, scale: Scale
) -> None:
    storm = Storm(urls, tmp_path, scale)
    await storm.rage(owner)
    print(storm.weather)
    assert await faults(owner) == {}, storm
    assert await owner.fetchval("SELECT count(*) FROM sessions") == scale.appointments * 99 // 100
    assert storm.weather.kills >= scale.kills
    assert storm.weather.cut_transactions > 0
    assert storm.weather.emptied_redis > 0


async def test_the_storm_finds_workers_without_locks_and_tables_without_uniqueness(
    urls: Urls, owner: "asyncpg.Connection[Any]", tmp_path: Path, scale: Scale
) -> None:
    await owner.execute(WITHOUT_UNIQUENESS)
    storm = Storm(urls, tmp_path, scale, reckless=True)
    await storm.rage(owner)
    assert "one_session_per_appointment" in await faults(owner)
