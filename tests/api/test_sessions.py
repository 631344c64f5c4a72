from datetime import timedelta
from typing import Any

import pytest

from libs.domain.db import Database
from libs.guardrails import Role
from tests.api.expect import faults, found, moment, problem, strangers
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.running import Api

FIELDS = {
    "id",
    "context",
    "kind",
    "modality",
    "source",
    "status",
    "appointment_id",
    "patient_id",
    "doctor_id",
    "created_at",
    "response_deadline",
    "activated_at",
    "connected_at",
    "ended_at",
    "end_reason",
    "units_charged",
    "remaining_seconds",
}


@pytest.mark.parametrize(
    ("modality", "kind", "status"),
    [("text", "text", "waiting"), ("voice", "call", "connecting"), ("video", "call", "connecting")],
)
async def test_a_session_is_shown_to_its_parties_and_operators(
    api: Api, clinic: Clinic, modality: str, kind: str, status: str
) -> None:
    live = await clinic.session(modality)
    for caller in (live.patient, live.doctor, clinic.operator):
        shown = found(await api.as_(caller).get(f"/sessions/{live.context}"))
        assert moment(shown.pop("created_at"))
        assert shown == {
            "id": live.ref.id,
            "context": f"{kind}_session:{live.ref.id}",
            "kind": kind,
            "modality": modality,
            "source": "APPOINTMENT",
            "status": status,
            "appointment_id": live.appointment_id,
            "patient_id": live.patient.user_id,
            "doctor_id": live.doctor.user_id,
            "response_deadline": None,
            "activated_at": None,
            "connected_at": None,
            "ended_at": None,
            "end_reason": None,
            "units_charged": 0,
            "remaining_seconds": None,
        }


async def test_strangers_do_not_learn_that_a_session_exists(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    for stranger in await strangers(clinic):
        client = api.as_(stranger)
        theirs = await client.get(f"/sessions/{live.context}")
        nobodys = await client.get(f"/sessions/text_session:{2**63 - 1}")
        problem(theirs, 404, "SESSION_NOT_FOUND")
        assert set(theirs.json()) == set(problem(nobodys, 404, "SESSION_NOT_FOUND"))
        problem(await client.post(f"/sessions/{live.context}/end"), 404, "SESSION_NOT_FOUND")
    assert await clinic.fetchval("SELECT status FROM sessions") == "waiting"


async def test_only_a_session_context_addresses_a_session(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    session, appointment = live.ref.id, live.appointment_id
    client = api.as_(live.patient)
    for identifier in (
        f"{appointment}",
        f"direct_session_{session}",
        "text_session:",
        "text_session:0",
        "text_session:-1",
        f"text_session:0{session}",
        f"text_session:{session}abc",
        "text_session:1e3",
        f"%20text_session:{session}",
        f"TEXT_SESSION:{session}",
        f"appointment:{appointment}",
        f"call_session_{session}",
        "text_session:99999999999999999999",
        f"text_session:{2**63}",
        "text_session:%EF%BC%97",  # a full-width 7
        f"text_session:{session}%00",
        f"text_session:{session}%0A",
        "%ED%A0%80",
    ):
        problem(await client.get(f"/sessions/{identifier}"), 400, "SESSION_CONTEXT_INVALID")
        problem(await client.post(f"/sessions/{identifier}/end"), 400, "SESSION_CONTEXT_INVALID")
        if identifier != str(appointment):
            problem(await client.get(f"/chat/{identifier}/messages"), 400, "SESSION_CONTEXT_INVALID")
    assert await clinic.fetchval("SELECT status FROM sessions") == "waiting"


async def test_the_old_spelling_is_normalised_and_counted_and_the_other_kind_does_not_exist(
    api: Api, clinic: Clinic
) -> None:
    live = await clinic.session()
    client = api.as_(live.patient)
    assert found(await client.get(f"/sessions/text_session_{live.ref.id}"))["context"] == live.context
    assert api.runtime.metrics.sample("legacy_identifier_total") == 1
    problem(await client.get(f"/sessions/call_session:{live.ref.id}"), 404, "SESSION_NOT_FOUND")


@pytest.mark.parametrize("role", [Role.PATIENT, Role.DOCTOR, Role.OPERATOR])
async def test_ending_ends_for_both_once_and_completes_the_appointment(api: Api, clinic: Clinic, role: Role) -> None:
    live = await clinic.session()
    caller = {Role.PATIENT: live.patient, Role.DOCTOR: live.doctor, Role.OPERATOR: clinic.operator}[role]
    path = f"/sessions/{live.context}/end"

    ended = found(await api.as_(caller).post(path, json={"reason": "all is said"} if role is Role.DOCTOR else None))
    assert set(ended) == {"session", "billing", "already_ended"}
    assert set(ended["session"]) == FIELDS
    assert ended["billing"] == {"units_charged": 0, "units_added": 0, "payouts": []}
    assert ended["already_ended"] is False
    session = ended["session"]
    assert session["status"] == "ended"
    assert session["end_reason"] == ("all is said" if role is Role.DOCTOR else f"ended_by_{role}")
    assert moment(session["ended_at"])

    for again in (live.patient, live.doctor, clinic.operator):
        repeated = found(await api.as_(again).post(path))
        assert (repeated["already_ended"], repeated["session"]) == (True, session)
    row = await clinic.fetchrow("SELECT status, (SELECT ended_seq FROM sessions) AS ended_seq FROM appointments")
    assert tuple(row) == ("COMPLETED", 0)
    assert await clinic.fetchval("SELECT count(*) FROM outbox_events WHERE name = 'session_ended'") == 1


async def test_ending_after_the_deadline_finds_the_session_expired(api: Api, clinic: Clinic, clock: Clock) -> None:
    live = await clinic.session()
    await clock.advance(timedelta(days=1))
    ended = found(await api.as_(live.doctor).post(f"/sessions/{live.context}/end"))
    assert ended["already_ended"] is True
    assert (ended["session"]["status"], ended["session"]["end_reason"]) == ("expired", "deadline")
    assert await clinic.fetchval("SELECT status FROM appointments") == "NO_SHOW"


async def test_ending_frees_both_parties_for_what_waits(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    waiting = await clinic.appointment(live.doctor, await clinic.patient(), starts_in=-2 * MINUTE, lasts=MINUTE)
    assert (await clinic.convert())[waiting].result == "failed"
    await api.as_(live.patient).post(f"/sessions/{live.context}/end")
    assert (await clinic.convert())[waiting].result == "created"


async def test_the_reason_of_an_end_is_bounded_text(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    client = api.as_(live.patient)
    for reason in ("x" * 201, 7, "a\x00b"):
        assert faults(await client.post(f"/sessions/{live.context}/end", json={"reason": reason})) == ["/reason"]
    assert await clinic.fetchval("SELECT status FROM sessions") == "waiting"


async def test_everybody_lists_their_own_sessions_and_operators_those_of_the_tenant(
    api: Api, clinic: Clinic, database: Database
) -> None:
    elsewhere = await Clinic.open(database, "Elsewhere")
    await elsewhere.session()
    one, two = await clinic.session(), await clinic.session("voice")
    await api.as_(one.patient).post(f"/sessions/{one.context}/end")

    async def listed(caller: Any, **query: str) -> list[str]:
        items = found(await api.as_(caller).get("/sessions", params=query))["items"]
        assert all(set(item) == FIELDS for item in items)
        return [item["context"] for item in items]

    assert await listed(one.patient) == await listed(one.doctor) == [one.context]
    assert await listed(two.patient) == await listed(two.doctor) == [two.context]
    assert await listed(clinic.operator) == [two.context, one.context]
    assert await listed(clinic.operator, status="ended") == [one.context]
    assert await listed(clinic.operator, status="active") == []
    assert await listed(await clinic.patient()) == []
