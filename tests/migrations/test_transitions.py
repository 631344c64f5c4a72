from itertools import product
from typing import Any

import asyncpg
import pytest

from libs.domain.appointments.transitions import HOLDS_SLOT, TRANSITIONS, Status
from tests.clinic import Clinic


async def placed(owner: "asyncpg.Connection[Any]", appointment_id: int, status: Status) -> None:
    """Puts an appointment into `status`, whatever the triggers say, for the rest of the transaction."""
    await owner.execute("SET LOCAL session_replication_role = replica")
    await owner.execute("UPDATE appointments SET status = $2 WHERE id = $1", appointment_id, status.value)
    await owner.execute("UPDATE busy_intervals SET active = true WHERE appointment_id = $1", appointment_id)
    await owner.execute("SET LOCAL session_replication_role = origin")


async def moved(owner: "asyncpg.Connection[Any]", appointment_id: int, old: Status, new: Status) -> bool | None:
    """Whether the slot is still taken after going from `old` to `new`; None when the database refuses to go."""
    attempt = owner.transaction()
    await attempt.start()
    try:
        await placed(owner, appointment_id, old)
        await owner.execute("UPDATE appointments SET status = $2 WHERE id = $1", appointment_id, new.value)
        taken: bool = await owner.fetchval(
            "SELECT bool_or(active) FROM busy_intervals WHERE appointment_id = $1", appointment_id
        )
    except asyncpg.CheckViolationError as refused:
        if refused.constraint_name != "appointments_transition":
            raise
        return None
    finally:
        await attempt.rollback()
    return taken


async def test_the_database_accepts_the_transitions_of_the_code_and_no_others(
    clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    appointment_id = (await clinic.session()).appointment_id
    accepted = {
        (old, new) for old, new in product(Status, Status) if await moved(owner, appointment_id, old, new) is not None
    }
    assert accepted == {(old, new) for old in Status for new in {*TRANSITIONS[old], old}}


async def test_a_transition_frees_the_slot_exactly_when_the_new_status_does_not_hold_it(
    clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    appointment_id = (await clinic.session()).appointment_id
    for old, targets in TRANSITIONS.items():
        for new in targets:
            assert await moved(owner, appointment_id, old, new) is (new in HOLDS_SLOT), f"{old} to {new}"


async def test_the_services_are_bound_by_the_transitions_too(clinic: Clinic) -> None:
    appointment_id = await clinic.appointment(status="CANCELLED")
    with pytest.raises(asyncpg.CheckViolationError, match="cannot go from CANCELLED to CONFIRMED"):
        await clinic.fetch("UPDATE appointments SET status = 'CONFIRMED' WHERE id = $1", appointment_id)


async def test_only_an_appointment_with_a_session_is_in_progress(clinic: Clinic) -> None:
    appointment_id = await clinic.appointment()
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await clinic.fetch("UPDATE appointments SET status = 'IN_PROGRESS' WHERE id = $1", appointment_id)
    assert refused.value.constraint_name == "appointments_in_progress_has_session_check"
