"""Conversion when the database raises, or another transaction is in the way: nobody else pays for it."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from libs.domain.conversion import statement
from libs.domain.conversion.runs import Outcome
from libs.domain.db import Database
from libs.observability.testing import capture_logs
from tests.clinic import MINUTE, Clinic
from tests.processes import until


@pytest.mark.parametrize(
    ("raised", "reason"),
    [("ERRCODE = 'check_violation'", "db_update_failed"), ("ERRCODE = 'raise_exception'", "unknown_error")],
)
async def test_only_the_row_on_which_the_database_raises_fails(
    clinic: Clinic, owner: "asyncpg.Connection[Any]", raised: str, reason: str
) -> None:
    culprit, *others = [await clinic.patient() for _ in range(4)]
    await owner.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE EXCEPTION 'no session for +49 151 23456789' USING {raised};
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON sessions FOR EACH ROW
            WHEN (NEW.patient_id = {culprit.user_id}) EXECUTE FUNCTION refuse();
        """
    )
    broken = await clinic.appointment(patient=culprit)
    sound = [await clinic.appointment(patient=patient) for patient in others]

    outcomes = await clinic.convert()

    assert [outcomes[each].result for each in sound] == ["created"] * 3
    assert (outcomes[broken].result, outcomes[broken].reason) == ("failed", reason)
    attempt = await clinic.fetchrow("SELECT * FROM conversion_attempts WHERE appointment_id = $1", broken)
    assert "no session for" in attempt["error_message"]
    assert "23456789" not in attempt["error_message"]
    wait = await clinic.fetchval("SELECT next_attempt_at - clock() FROM appointments WHERE id = $1", broken)
    assert wait == pytest.approx(MINUTE, abs=timedelta(seconds=2))


async def test_a_row_that_nobody_can_change_holds_up_no_other(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    poison = await clinic.appointment(starts_in=-2 * MINUTE)
    await owner.execute(f"ALTER TABLE appointments ADD CONSTRAINT poison CHECK (id <> {poison}) NOT VALID")
    outcomes: list[Outcome] = []
    converter = clinic.converter(outcomes, batch_limit=1)
    sound = [await clinic.appointment() for _ in range(2)]

    for _ in range(3):
        await converter.auto_start(wait=True)

    told = {outcome.appointment_id: outcome for outcome in outcomes}
    assert [told[each].result for each in sound] == ["created"] * 2
    assert (told[poison].result, told[poison].reason) == ("failed", "db_update_failed")
    attempts = await clinic.fetch("SELECT reason FROM conversion_attempts WHERE appointment_id = $1", poison)
    assert [row["reason"] for row in attempts] == ["db_update_failed"], "It is left alone for a while."


async def test_what_the_database_says_of_a_row_is_kept_without_the_row(
    clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    await owner.execute("ALTER TABLE sessions ADD CONSTRAINT refuse CHECK (false) NOT VALID")
    broken = await clinic.appointment()
    with capture_logs() as logs:
        outcome = (await clinic.convert())[broken]
        assert "Failing row" not in logs.raw()
    assert outcome.error_message == 'new row for relation "sessions" violates check constraint "refuse"'


async def test_a_party_whose_row_another_transaction_holds_delays_only_its_own_appointment(
    clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    doctor = await clinic.doctor()
    live = await clinic.session(doctor=doctor)
    blocked, sound = await clinic.appointment(doctor), await clinic.appointment()
    async with owner.transaction():
        # As a request does that ends the session and takes its time.
        await owner.execute("UPDATE sessions SET status = 'ended', ended_at = clock() WHERE id = $1", live.ref.id)
        outcomes = await clinic.convert()
        assert outcomes.keys() == {sound}
        assert outcomes[sound].result == "created"
    assert (await clinic.convert())[blocked].result == "created"


async def test_a_new_subscription_is_not_overlooked_by_a_conversion_under_way(
    clinic: Clinic, database: Database
) -> None:
    patient = await clinic.patient(units=None)
    appointment_id = await clinic.appointment(patient=patient)
    async with database.autocommit() as connection, connection.transaction():
        (row,) = await connection.fetch(statement.CONVERT_ONE, uuid4(), appointment_id)
        assert row["reason"] == "missing_doctor_or_patient"
        subscribing = asyncio.create_task(clinic.subscribe(patient))
        await until(lambda: clinic.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
    await subscribing

    assert (await clinic.convert())[appointment_id].result == "created"
