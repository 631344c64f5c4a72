"""`sessiongate explain` and `sessiongate flags report` on what a real API and a conversion have left behind."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from libs.domain.billing import ledger
from libs.domain.transaction import transaction
from tests.api.calls import CANARY, Owner
from tests.api.expect import DAY, book, found
from tests.api.test_rollout import decided
from tests.cli.conftest import sessiongate
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.conftest import MakeApi, Urls
from tests.domain.test_invariants import BILL
from tests.running import Api

Run = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def run(urls: Urls, tmp_path: Path) -> Run:
    known = {
        "SESSIONGATE_HOME": str(tmp_path),
        "SESSIONGATE_DATABASE_URL": urls.app,
        "SESSIONGATE_REDIS_URL": urls.redis,
        "COLUMNS": "250",
    }
    return lambda *arguments: sessiongate(tmp_path, *arguments, env=known)


def told(run: Run, *arguments: str) -> Any:
    completed = run(*arguments, "--json")
    assert (completed.returncode, completed.stderr) == (0, "")
    return json.loads(completed.stdout)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


async def a_whole_story(api: Api, clinic: Clinic, clock: Clock) -> tuple[int, str]:
    """Booked, moved, delayed, held and ended, with all that goes wrong on the way."""
    patient, doctor = await clinic.patient(units=None), await clinic.doctor()
    booked = await book(api, clinic, patient, doctor, reason=CANARY)
    appointment_id: int = booked["id"]
    path = f"/appointments/{appointment_id}"
    found(await api.as_(doctor).post(f"{path}/confirm"))
    new_time = (datetime.fromisoformat(booked["starts_at"]) + timedelta(hours=1)).isoformat()
    found(await api.as_(doctor).post(f"{path}/reschedule", json={"starts_at": new_time}))
    found(await api.as_(patient).post(f"{path}/reschedule/accept"))
    message = {"client_message_id": "1", "body": CANARY}
    await api.as_(patient).post(f"/chat/{appointment_id}/messages", json=message)
    await decided(clinic, 1)
    await clock.advance(DAY + timedelta(hours=1))
    await clinic.convert()
    await clinic.subscribe(patient)
    await clock.advance(2 * MINUTE)
    await clinic.convert()
    context = found(await api.as_(patient).get(f"{path}/session"))["session_context"]
    await api.as_(patient).post(f"/chat/{appointment_id}/messages", json=message)
    found(await api.as_(patient).post(f"/chat/{context}/messages", json=message), 201)
    found(await api.as_(doctor).post(f"/chat/{context}/messages", json=message | {"client_message_id": "2"}), 201)
    found(await api.as_(doctor).post(f"/sessions/{context}/end", json={"reason": CANARY}))
    await api.as_(patient).post(f"/chat/{context}/messages", json=message | {"client_message_id": "3"})
    await decided(clinic, 6)
    return appointment_id, context


async def test_the_whole_story_is_told_in_order(api: Api, clinic: Clinic, clock: Clock, run: Run) -> None:
    appointment_id, context = await a_whole_story(api, clinic, clock)
    await clinic.dispatch()
    story = told(run, "explain", str(appointment_id))
    assert [kind for kind in kinds(story) if kind != "notified"] == [
        "booked",
        "appointment_confirmed",
        "reschedule_proposed",
        "reschedule_accepted",
        "refused",
        "due",
        "conversion_failed",
        "conversion_created",
        "session_created",
        "refused",
        "first_message",
        "first_message",
        "activated",
        "unit_charged",
        "paid_out",
        "session_ended",
        "refused",
    ]
    assert [event["at"] for event in story] == sorted(event["at"] for event in story)
    assert all(event["at"].endswith("Z") for event in story)
    by_kind = {event["kind"]: event for event in reversed(story)}
    assert by_kind["booked"]["starts_at"] == by_kind["appointment_confirmed"]["starts_at"]
    assert by_kind["due"]["at"] == by_kind["reschedule_accepted"]["starts_at"] != by_kind["booked"]["starts_at"]
    assert by_kind["conversion_failed"]["reason"] == "missing_doctor_or_patient"
    assert by_kind["session_created"]["session_context"] == context
    assert by_kind["session_ended"]["messages"] == 2
    refusals = [(event["reason"], event["identifier"]) for event in story if event["kind"] == "refused"]
    assert refusals == [
        ("SESSION_NOT_READY", str(appointment_id)),
        ("SESSION_CONTEXT_REQUIRED", str(appointment_id)),
        ("SESSION_NOT_ACTIVE", context),
    ]
    assert sorted(event["notification"] for event in story if event["kind"] == "notified") == sorted(
        2 * ["appointment_confirmed", "reschedule_proposed", "reschedule_accepted", "session_started", "session_ended"]
    )
    assert told(run, "explain", context) == story
    assert told(run, "explain", context.replace(":", "_")) == story
    assert CANARY not in str(story), "Nothing that a person wrote."


async def test_for_a_person_there_is_a_line_for_each_event(api: Api, clinic: Clinic, clock: Clock, run: Run) -> None:
    appointment_id, context = await a_whole_story(api, clinic, clock)
    shown = run("explain", str(appointment_id))
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert len(lines) == len(told(run, "explain", str(appointment_id)))
    assert f"text appointment {appointment_id} booked for " in lines[0]
    (refused,) = [line for line in lines if "SESSION_CONTEXT_REQUIRED" in line]
    assert f"send_message on {appointment_id} refused" in refused
    assert "with python-httpx" in refused
    assert refused.rstrip().endswith("by ENFORCE_SESSION_GATED_CHAT")
    assert [f"{context} created" in line for line in lines].count(True) == 1
    names = [row["name"] for row in await clinic.fetch("SELECT name FROM users")]
    assert [name for name in (*names, CANARY) if name in shown.stdout] == []


async def test_a_call_that_nobody_took_is_a_story_too(clinic: Clinic, clock: Clock, run: Run) -> None:
    appointment_id = await clinic.appointment(modality="video", starts_in=MINUTE)
    await clock.advance(MINUTE)
    await clinic.convert()
    await clock.advance(60 * MINUTE)
    await clinic.settle()
    story = told(run, "explain", str(appointment_id))
    assert kinds(story) == ["booked", "due", "conversion_created", "session_created", "session_missed"]
    assert story[-1]["reason"] == "deadline"
    assert told(run, "explain", story[-2]["session_context"]) == story


async def test_what_was_charged_and_paid_is_part_of_the_story(api: Api, clinic: Clinic, clock: Clock, run: Run) -> None:
    live = await clinic.session("voice", starts_in=timedelta())
    found(await api.as_(live.doctor).post(f"/sessions/{live.context}/ring"))
    await clinic.begin(live, allowance=2)
    subscription_id = await clinic.fetchval("SELECT id FROM subscriptions")
    for minutes in (10, 9, 1):
        await clock.advance(minutes * MINUTE)
        await clinic.settle()
    await clock.advance(MINUTE)
    async with transaction(clinic.database, clinic.bell) as tx:
        await ledger.refund(tx, clinic.tenant_id, clinic.operator, live.ref, unit=2)
    story = told(run, "explain", live.context)
    units = ("unit_charged", "paid_out")
    assert kinds(story) == [
        *("booked", "due", "conversion_created", "session_created", "rang", "activated", "connected"),
        *(*units, "ending_soon", *units, "session_ended", "unit_refunded", "payout_taken_back"),
    ]
    assert [event["at"] for event in story] == sorted(event["at"] for event in story)
    assert told(run, "explain", str(live.appointment_id)) == story
    by_kind = {event["kind"]: event for event in story}
    charged, paid, refunded, back = (
        {name: value for name, value in by_kind[kind].items() if name not in ("at", "kind")}
        for kind in (*units, "unit_refunded", "payout_taken_back")
    )
    transactions = {"transaction_id": refunded["reverses"]}
    assert charged == {"unit": 2, "modality": "voice", "subscription_id": subscription_id, **transactions}
    money = {"unit": 2, "amount_minor": 350000, "currency": "MWK", "user_id": live.doctor.user_id, "role": "doctor"}
    assert paid == money | transactions
    assert refunded == charged | {"transaction_id": refunded["transaction_id"], "reverses": refunded["reverses"]}
    assert back == money | {"transaction_id": refunded["transaction_id"]}
    assert by_kind["rang"]["user_id"] == live.doctor.user_id
    assert (by_kind["session_ended"]["reason"], by_kind["session_ended"]["units_charged"]) == ("allowance_spent", 2)

    shown = run("explain", live.context).stdout
    for words in (
        f"rung for the other party · user {live.doctor.user_id}",
        f"unit 2 charged to subscription {subscription_id}, voice",
        f"350000 MWK in minor units paid for unit 2 · doctor {live.doctor.user_id}",
        "both warned that the time is nearly up",
        f"unit 2 given back to subscription {subscription_id}, voice",
        f"350000 MWK in minor units taken back for unit 2 · doctor {live.doctor.user_id}",
    ):
        assert words in shown


async def test_a_legacy_bill_is_part_of_the_story(clinic: Clinic, owner: Owner, run: Run) -> None:
    appointment_id = await clinic.appointment(starts_in=timedelta())
    await owner.fetchval(BILL, appointment_id, "COMPLETED")
    story = told(run, "explain", str(appointment_id))
    assert kinds(story) == ["booked", "due", "legacy_billed", "paid_out"]
    assert story[2]["unit"] == 1
    assert "unit 1 billed by a legacy path to subscription" in run("explain", str(appointment_id)).stdout


async def test_a_parked_appointment_says_so(clinic: Clinic, run: Run) -> None:
    appointment_id = await clinic.appointment(modality="hologram")
    await clinic.fetch("UPDATE appointments SET conversion_failures = 9 WHERE id = $1", appointment_id)
    await clinic.convert()
    assert kinds(told(run, "explain", str(appointment_id)))[-2:] == ["conversion_failed", "parked"]


async def test_a_loop_of_refusals_does_not_bury_the_story(clinic: Clinic, owner: Owner, run: Run) -> None:
    appointment_id = await clinic.appointment(starts_in=DAY)
    await owner.execute(
        """
        INSERT INTO decisions (tenant_id, at, operation, identifier, appointment_id, user_id, role, client, verdict,
                               reason, flags)
        SELECT $1, clock() + n * interval '1 ms', 'send_message', $2::bigint::text, $2::bigint, 1, 'patient', 'okhttp',
               'refused', 'SESSION_NOT_READY', '{}'
        FROM generate_series(1, 1200) n
        """,
        clinic.tenant_id,
        appointment_id,
    )
    story = told(run, "explain", str(appointment_id))
    assert kinds(story) == ["booked", "earlier_decisions", *["refused"] * 1000]
    assert story[1]["number"] == 200


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("987654", "There is no appointment 987654.\n"),
        ("text_session:987654", "There is no session text_session:987654.\n"),
        ("call_session:1", "There is no session call_session:1.\n"),
        ("nonsense", "Name an appointment such as 12, or a session such as text_session:7.\n"),
        ("0", "Name an appointment such as 12, or a session such as text_session:7.\n"),
    ],
)
async def test_what_does_not_exist_is_said_in_a_sentence(clinic: Clinic, run: Run, reference: str, said: str) -> None:
    await clinic.session()
    refused = run("explain", reference)
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", said)


async def test_the_report_says_the_same_as_that_of_the_api(make_api: MakeApi, clinic: Clinic, run: Run) -> None:
    api = await make_api()
    session = await clinic.session()
    found(await api.as_(session.patient).get(f"/chat/{session.appointment_id}/messages"))
    found(await api.as_(session.patient).get(f"/chat/{session.context}/messages"))
    await decided(clinic, 2)
    mine = told(run, "flags", "report", "--tenant", str(clinic.tenant_id))
    answer = found(await api.as_(clinic.operator).get("/admin/rollout"))
    assert mine["flags"] == answer["flags"]
    assert told(run, "flags", "report")["flags"] == answer["flags"]
    assert {flag["requests"] for flag in told(run, "flags", "report", "--tenant", "987654")["flags"]} == {0}

    shown = run("flags", "report", "--since", "90m")
    assert shown.returncode == 0
    (line,) = [line for line in shown.stdout.splitlines() if "get_messages" in line]
    assert "ENFORCE_SESSION_GATED_CHAT" in line
    assert "python-httpx" in line
    refused = run("flags", "report", "--since", "yesterday")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "--since is a span such as 90m, 24h or 7d, or a timestamp with an offset.\n"
