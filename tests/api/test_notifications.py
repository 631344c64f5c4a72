"""Who hears of what: every change of schedule reaches both parties, and nobody else."""

from datetime import timedelta
from typing import Any

from libs.domain.appointments.expiry import expire_pending
from libs.domain.db import Database
from libs.domain.transaction import transaction
from libs.guardrails import Principal
from tests.api.expect import DAY, ahead, book, found, moment
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.running import Api


async def told(api: Api, person: Principal) -> list[dict[str, Any]]:
    """The person's notifications, newest first."""
    items: list[dict[str, Any]] = found(await api.as_(person).get("/notifications"))["items"]
    return items


async def kinds(api: Api, *people: Principal) -> list[list[str]]:
    """What each of them has heard of, oldest first."""
    return [[item["kind"] for item in reversed(await told(api, person))] for person in people]


async def change(api: Api, caller: Principal, appointment_id: int, what: str, **body: Any) -> None:
    found(await api.as_(caller).post(f"/appointments/{appointment_id}/{what}", json=body or None))


async def test_a_request_is_told_to_both_once_it_is_confirmed(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    booked = await book(api, clinic, patient, doctor)
    assert await clinic.dispatch() == 0

    await change(api, doctor, booked["id"], "confirm")
    assert await kinds(api, patient, doctor) == [[], []], "Only what was delivered is listed."

    assert await clinic.dispatch() == 1
    for person in (patient, doctor):
        [shown] = await told(api, person)
        assert moment(shown.pop("created_at"))
        assert isinstance(shown.pop("id"), int)
        assert shown == {
            "kind": "appointment_confirmed",
            "appointment_id": booked["id"],
            "session_context": None,
            "read_at": None,
        }


async def test_both_hear_of_a_cancellation_but_not_of_its_reason(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    for status in ("PENDING", "CONFIRMED"):
        appointment_id = await clinic.appointment(doctor, patient, starts_in=DAY, status=status)
        await change(api, patient, appointment_id, "cancel", reason="I am well again")
    await clinic.dispatch()
    assert await kinds(api, patient, doctor) == [["appointment_cancelled"] * 2] * 2
    assert "well again" not in str(await told(api, doctor))


async def test_both_hear_of_a_proposed_time_and_of_the_answer(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    appointment_id = await clinic.appointment(doctor, patient, starts_in=DAY)
    heard = []
    for answer, kind in (("reject", "reschedule_rejected"), ("accept", "reschedule_accepted")):
        await change(api, doctor, appointment_id, "reschedule", starts_at=await ahead(clinic, 2 * DAY))
        heard.append("reschedule_proposed")
        await clinic.dispatch()
        assert await kinds(api, patient, doctor) == [heard] * 2
        await change(api, patient, appointment_id, f"reschedule/{answer}")
        heard.append(kind)
        await clinic.dispatch()
        assert await kinds(api, patient, doctor) == [heard] * 2


async def test_both_hear_of_a_request_that_nobody_confirmed_in_time(api: Api, clinic: Clinic, clock: Clock) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    await clinic.appointment(doctor, patient, starts_in=MINUTE, status="PENDING")
    await clock.advance(MINUTE)
    async with transaction(clinic.database, clinic.bell) as tx:
        await expire_pending(tx)
    await clinic.dispatch()
    assert await kinds(api, patient, doctor) == [["appointment_expired"]] * 2


async def test_both_hear_of_a_session_and_where_it_is(api: Api, clinic: Clinic) -> None:
    for modality in ("text", "voice", "video"):
        live = await clinic.session(modality)
        await clinic.dispatch()
        found(await api.as_(live.doctor).post(f"/sessions/{live.context}/end"))
        await clinic.dispatch()
        assert await kinds(api, live.patient, live.doctor) == [["session_started", "session_ended"]] * 2
        for person in (live.patient, live.doctor):
            for shown in await told(api, person):
                assert (shown["appointment_id"], shown["session_context"]) == (live.appointment_id, live.context)


async def test_both_hear_of_a_session_that_expired(api: Api, clinic: Clinic, clock: Clock) -> None:
    live = await clinic.session()
    await clock.advance(timedelta(hours=2))
    await clinic.settle()
    await clinic.dispatch()
    assert await kinds(api, live.patient, live.doctor) == [["session_started", "session_ended"]] * 2


async def test_a_change_that_is_refused_is_told_to_nobody(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    appointment_id = await clinic.appointment(doctor, patient, starts_in=DAY, status="CANCELLED")
    for what in ("confirm", "cancel", "reschedule/accept"):
        assert (await api.as_(doctor).post(f"/appointments/{appointment_id}/{what}")).status_code in (403, 409)
    assert await clinic.dispatch() == 0
    assert await kinds(api, patient, doctor) == [[], []]


async def test_what_is_delivered_again_is_told_once(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    found(await api.as_(live.patient).post(f"/sessions/{live.context}/end"))
    assert await clinic.dispatch() == 2
    await clinic.fetch("UPDATE outbox_deliveries SET dispatched_at = NULL")
    assert await clinic.dispatch() == 2
    assert await clinic.fetchval("SELECT count(*) FROM outbox_deliveries WHERE dispatched_at IS NULL") == 0
    assert await kinds(api, live.patient, live.doctor) == [["session_started", "session_ended"]] * 2


async def test_nobody_hears_of_the_appointments_of_others(api: Api, clinic: Clinic, database: Database) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    others = [await clinic.patient(), await clinic.doctor(), clinic.operator, elsewhere.operator]
    theirs = await elsewhere.session()
    live = await clinic.session()
    await clinic.dispatch()
    assert await kinds(api, *others) == [[]] * len(others)
    assert [item["session_context"] for item in await told(api, live.patient)] == [live.context]
    assert [item["session_context"] for item in await told(api, theirs.patient)] == [theirs.context]


async def test_pages_hold_the_newest_first_and_the_callers_own_only(api: Api, clinic: Clinic) -> None:
    patient, doctor = await clinic.patient(), await clinic.doctor()
    for day in range(1, 6):
        mine = await clinic.appointment(doctor, patient, starts_in=day * DAY, status="PENDING")
        await change(api, doctor, mine, "confirm")
        await change(api, clinic.operator, await clinic.appointment(starts_in=day * DAY), "cancel")
    await clinic.dispatch()

    client = api.as_(patient)
    first = found(await client.get("/notifications", params={"limit": 3}))
    assert first["has_more"] is True
    second = found(await client.get("/notifications", params={"limit": 3, "cursor": first["next_cursor"]}))
    assert (second["has_more"], second["next_cursor"]) == (False, None)
    items = first["items"] + second["items"]
    assert {item["kind"] for item in items} == {"appointment_confirmed"}
    assert [item["id"] for item in items] == sorted((item["id"] for item in items), reverse=True)
    assert len({item["appointment_id"] for item in items}) == 5
