"""Writing down who does something, when the database does not take it."""

from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from libs.domain.sessions import activity as room
from libs.domain.sessions.activity import Activity
from libs.guardrails import Claim, Facts, Flags, SessionFacts, SessionStatus, Verdict
from libs.guardrails.operations import GetMessages
from tests.clinic import ACTIVATE, MINUTE, Clinic, LiveSession


@pytest.fixture
def activity(clinic: Clinic) -> Activity:
    return Activity(clinic.database, inactivity=timedelta(minutes=15))


async def active(clinic: Clinic) -> LiveSession:
    live = await clinic.session()
    await clinic.fetch(f"{ACTIVATE}, idle_at = clock() + interval '1 minute' WHERE id = $1", live.ref.id)
    return live


def sees(activity: Activity, live: LiveSession) -> None:
    """The guard allows the patient to read."""
    session = SessionFacts(
        id=live.ref.id,
        kind=live.ref.kind,
        status=SessionStatus.ACTIVE,
        patient_id=live.patient.user_id,
        doctor_id=live.doctor.user_id,
        appointment_id=live.appointment_id,
        conversation_id=1,
    )
    claim = Claim(GetMessages, live.patient, live.ref)
    activity.saw(claim, Facts(caller_active=True, session=session), Flags(), Verdict())


async def kept(clinic: Clinic) -> set[int]:
    rows = await clinic.fetch("SELECT id FROM sessions WHERE idle_at > clock() + interval '14 minutes'")
    return {row["id"] for row in rows}


async def test_what_the_database_did_not_take_is_written_the_next_time(
    clinic: Clinic, activity: Activity, owner: "asyncpg.Connection[Any]"
) -> None:
    live = await active(clinic)
    sees(activity, live)
    await owner.execute("ALTER TABLE sessions RENAME TO elsewhere")
    with pytest.raises(asyncpg.UndefinedTableError):
        await activity.flush()
    await owner.execute("ALTER TABLE elsewhere RENAME TO sessions")
    await activity.flush()
    assert await kept(clinic) == {live.ref.id}


async def test_no_more_is_noted_than_there_is_room_for(
    clinic: Clinic, activity: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIMIT", 1)
    first, second = await active(clinic), await active(clinic)
    sees(activity, first)
    sees(activity, second)
    await activity.flush()
    assert await kept(clinic) == {first.ref.id}
    sees(activity, second)
    await activity.flush()
    assert await kept(clinic) == {first.ref.id, second.ref.id}


async def test_all_that_is_noted_is_written_in_batches(
    clinic: Clinic, activity: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BATCH", 2)
    lives = [await active(clinic) for _ in range(5)]
    for live in lives:
        sees(activity, live)
    await activity.flush()
    assert await kept(clinic) == {live.ref.id for live in lives}


async def test_a_session_that_is_over_stays_as_it_is(clinic: Clinic, activity: Activity) -> None:
    live = await active(clinic)
    sees(activity, live)
    await clinic.fetch("UPDATE sessions SET idle_at = clock() - $1::interval, tick_at = clock()", MINUTE)
    await activity.flush()
    assert await kept(clinic) == set()
    assert [settled.end_reason for settled in await clinic.settle()] == ["inactivity"]
