"""A commit that fails is never answered as a success: nothing is stored, and nobody is woken."""

import asyncio
import dataclasses
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from libs.domain.jobs import ConvertDue, DispatchOutbox
from tests.clinic import Clinic, RecordingBell
from tests.running import Api

REFUSE_COMMITS = """
    CREATE FUNCTION refuse_commit() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION 'Not today.' USING ERRCODE = '{state}'; END $$;
    CREATE CONSTRAINT TRIGGER refuse_commit AFTER INSERT OR UPDATE ON appointments
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_commit();
    CREATE CONSTRAINT TRIGGER refuse_commit AFTER INSERT OR UPDATE ON users
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_commit();
"""
ALLOW_COMMITS = "DROP FUNCTION refuse_commit CASCADE"

WRITTEN = ("appointments", "busy_intervals", "users", "outbox_events", "outbox_deliveries", "audit_log")


async def stored(owner: "asyncpg.Connection[Any]") -> dict[str, str | None]:
    return {table: await owner.fetchval(f"SELECT json_agg(t ORDER BY id) FROM {table} t") for table in WRITTEN}


@dataclasses.dataclass
class Change:
    """A request that changes rows, and for whom it rings when it succeeds."""

    arguments: dict[str, Any]
    status: int
    rings: set[type]


async def change_of(name: str, clinic: Clinic) -> Change:
    match name:
        case "booking":
            doctor = await clinic.doctor()
            patient = await clinic.patient()
            starts_at = (await clinic.fetchval("SELECT clock()") + timedelta(hours=1)).isoformat()
            new = {
                "doctor_id": doctor.user_id,
                "patient_id": patient.user_id,
                "modality": "text",
                "starts_at": starts_at,
            }
            return Change({"method": "POST", "url": "/appointments", "json": new}, 201, set())
        case "confirming":
            booked = await clinic.appointment(status="PENDING", starts_in=timedelta(hours=1))
            return Change({"method": "POST", "url": f"/appointments/{booked}/confirm"}, 200, {DispatchOutbox})
        case _:
            away = await clinic.doctor(active=False)
            activation = {"method": "PATCH", "url": f"/admin/users/{away.user_id}", "json": {"active": True}}
            return Change(activation, 200, {ConvertDue})


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [("P0001", 500, "INTERNAL_ERROR"), ("23514", 500, "INTERNAL_ERROR"), ("40001", 503, "OVERLOADED")],
    ids=["a fault", "a constraint", "a serialisation failure"],
)
@pytest.mark.parametrize("name", ["booking", "confirming", "activating a user"])
async def test_a_commit_that_fails_is_no_success(
    api: Api, clinic: Clinic, owner: "asyncpg.Connection[Any]", name: str, state: str, status: int, code: str
) -> None:
    change = await change_of(name, clinic)
    bell = RecordingBell()
    api.app.state.runtime = dataclasses.replace(api.runtime, bell=bell)
    before = await stored(owner)
    await owner.execute(REFUSE_COMMITS.format(state=state))

    failed = await api.as_(clinic.operator).request(**change.arguments)

    assert (failed.status_code, failed.json()["code"]) == (status, code)
    assert failed.headers["Content-Type"] == "application/problem+json"
    assert "Not today" not in failed.text
    assert await stored(owner) == before
    assert bell.rung == []

    await owner.execute(ALLOW_COMMITS)
    succeeded = await api.as_(clinic.operator).request(**change.arguments)
    assert succeeded.status_code == change.status, succeeded.text
    assert await stored(owner) != before
    assert {type(job) for job in bell.rung} == change.rings


LOSE_TWICE = """
    CREATE SEQUENCE attempts;
    GRANT USAGE ON attempts TO PUBLIC;
    CREATE FUNCTION refuse_commit() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('attempts') <= 2 THEN RAISE EXCEPTION 'Not yet.' USING ERRCODE = '40001'; END IF;
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER refuse_commit AFTER INSERT ON appointments
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_commit();
"""


async def test_a_request_that_loses_to_another_transaction_is_done_over_with_one_effect(
    api: Api, clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    booking = await change_of("booking", clinic)
    await owner.execute(LOSE_TWICE)
    won = await api.as_(clinic.operator).request(**booking.arguments, headers={"Idempotency-Key": "once"})
    assert won.status_code == 201, won.text
    assert await owner.fetchval("SELECT last_value FROM attempts") == 3
    assert await owner.fetchval("SELECT count(*) FROM appointments WHERE id = $1", won.json()["id"]) == 1
    again = await api.as_(clinic.operator).request(**booking.arguments, headers={"Idempotency-Key": "once"})
    assert again.json() == won.json()


async def test_the_victim_of_a_deadlock_is_done_over(
    api: Api, clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    """Accepting a new time takes the doctor's lock and then the appointment's row; the other takes them crosswise,
    and is the more patient of the two."""
    doctor, patient = await clinic.doctor(), await clinic.patient()
    booked = await clinic.appointment(doctor, patient, starts_in=timedelta(hours=1))
    other_time = (await clinic.fetchval("SELECT clock()") + timedelta(hours=3)).isoformat()
    await api.as_(doctor).post(f"/appointments/{booked}/reschedule", json={"starts_at": other_time})
    await owner.execute("SET deadlock_timeout = '1min'")
    async with owner.transaction():
        await owner.execute("SELECT FROM appointments WHERE id = $1 FOR UPDATE", booked)
        accepting = asyncio.create_task(api.as_(patient).post(f"/appointments/{booked}/reschedule/accept"))
        await _until_somebody_waits(owner)
        await owner.execute("SELECT pg_advisory_xact_lock($1, hashint8($2))", 0x5E55, doctor.user_id)
        assert not accepting.done()
    accepted = await accepting
    assert (accepted.status_code, accepted.json()["status"]) == (200, "CONFIRMED")


async def _until_somebody_waits(owner: "asyncpg.Connection[Any]") -> None:
    async with asyncio.timeout(10):
        while not await owner.fetchval(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock')"
        ):
            await asyncio.sleep(0.02)
