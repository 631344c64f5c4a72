"""Chat with every identifier, in every state, under every combination of flags; and what it says beside the code.

The expected answers are those of tests/guardrails/promises.py, the table that the pure decision is compared with.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, TypeAlias

import pytest
from httpx2 import Response

from libs.guardrails import AppointmentRef, Flag, Flags, Principal
from tests.api.calls import Owner, rows
from tests.api.expect import DAY, found, problem
from tests.clinic import ACTIVATE, MINUTE, Clinic
from tests.conftest import MakeApi
from tests.guardrails.promises import ALL_FLAGS, APPOINTMENT_STATUSES, SUBJECTS, Case, promised
from tests.running import Api

NOBODYS: Final = 2**63 - 1
"""An id that nothing has."""


@dataclass
class Place:
    """Where a patient would chat: an appointment in some status, or parked, and its session in some state, or
    overdue. Where there is nothing, the ids are nobody's."""

    patient: Principal
    appointment_id: int = NOBODYS
    appointment: tuple[str, bool] | None = None
    session_id: int = NOBODYS
    kind: str | None = None
    session: tuple[str, bool] | None = None
    spellings: tuple[str, ...] = tuple(SUBJECTS)
    message_id: int = NOBODYS
    """Of a message sent here, for the operations that are about one."""

    def identifier(self, spelling: str) -> str:
        return {
            "text session": f"text_session:{self.session_id}",
            "legacy spelling": f"text_session_{self.session_id}",
            "call session": f"call_session:{self.session_id}",
            "appointment": str(self.appointment_id),
        }[spelling]

    def case(self, operation: str, spelling: str, flags: Flags) -> Case:
        """What the promises are asked about this place: the session of another kind is none."""
        subject = SUBJECTS[spelling]
        addressed = isinstance(subject, AppointmentRef) or subject.kind == self.kind
        session = (*self.session, False) if addressed and self.session else None
        return Case(operation, spelling, "the patient", True, session, self.appointment, flags)


# How a session that was just converted comes into another state.
COMES_ABOUT: Final = {
    ("waiting", False): "SELECT",
    ("connecting", False): "SELECT",
    ("active", False): f"{ACTIVATE} WHERE id = $1",
    ("waiting", True): "UPDATE sessions SET response_deadline = clock() WHERE id = $1",
    ("ended", False): """
        WITH ended AS (UPDATE sessions SET status = 'ended', ended_at = clock(), ended_seq = 0 WHERE id = $1)
        UPDATE appointments SET status = 'COMPLETED' WHERE session_id = $1
    """,
}
SESSIONS: Final = [
    *(("text", state) for state in COMES_ABOUT if state[0] != "connecting"),
    *(("video", state) for state in (("connecting", False), ("ended", False))),
]


async def places(clinic: Clinic) -> list[Place]:
    """One of each sort."""
    everywhere = [Place(await clinic.patient())]
    for modality, state in SESSIONS:
        live = await clinic.session(modality)
        await clinic.fetch(COMES_ABOUT[state], *([live.ref.id] if "$1" in COMES_ABOUT[state] else []))
        appointment = ("IN_PROGRESS", False)
        everywhere.append(Place(live.patient, live.appointment_id, appointment, live.ref.id, live.ref.kind, state))
    for status, parked in (*((status, False) for status in APPOINTMENT_STATUSES), ("CONFIRMED", True)):
        patient = await clinic.patient()
        waiting = await clinic.appointment(patient=patient, status=status, starts_in=10 * MINUTE)
        if parked:
            await clinic.fetch("UPDATE appointments SET parked_at = clock() WHERE id = $1", waiting)
        everywhere.append(Place(patient, waiting, (status, parked), spellings=("appointment",)))
    return everywhere


Perform: TypeAlias = Callable[[Api, Place, str], Coroutine[Any, Any, Response]]


def request(method: str, path: str, **body: Any) -> Perform:
    """Performs an operation; `path` is what follows the identifier."""

    async def perform(api: Api, place: Place, identifier: str) -> Response:
        new = body | {"client_message_id": f"{path} {identifier}"} if "body" in body else body
        address = f"/chat/{identifier}{path.format(message_id=place.message_id)}"
        return await api.as_(place.patient).request(method, address, json=new or None)

    return perform


# Sending comes first, so that there is a message to be answered and marked.
OPERATIONS: Final[dict[str, tuple[Perform, int]]] = {
    "send_message": (request("POST", "/messages", body="Hello"), 201),
    "get_messages": (request("GET", "/messages"), 200),
    "reply_to_message": (request("POST", "/messages/{message_id}/replies", body="Yes"), 201),
    "add_reaction": (request("PUT", "/messages/{message_id}/reactions/!"), 204),
    "remove_reaction": (request("DELETE", "/messages/{message_id}/reactions/!"), 204),
    "start_typing": (request("PUT", "/typing"), 204),
    "stop_typing": (request("DELETE", "/typing"), 204),
    "mark_as_read": (request("PUT", "/read", seq=1), 200),
}
"""Every chat operation: how it is performed, and the status of its success."""

REFUSALS: Final = {
    "SESSION_CONTEXT_REQUIRED": 400,
    "SESSION_NOT_READY": 403,
    "SESSION_NOT_FOUND": 404,
    "APPOINTMENT_NOT_FOUND": 404,
    "SESSION_NOT_ACTIVE": 409,
}


def check(place: Place, response: Response, answer: str, success: int) -> None:
    """Compares an answer with the promised one, and with what a client needs to know to go on."""
    if answer == "allowed" or answer.startswith("warned"):
        assert response.status_code == success, f"{response.request.method} {response.request.url}: {response.text}"
        if success == 201:
            place.message_id = response.json()["id"]
        return
    body = problem(response, REFUSALS[answer], answer)
    poll = {"method": "GET", "href": f"/api/v1/appointments/{place.appointment_id}/session"}
    match answer:
        case "SESSION_CONTEXT_REQUIRED":
            assert (body["appointment_id"], body["session_id"]) == (place.appointment_id, place.session_id)
            assert body["session_context"] == f"{place.kind}_session:{place.session_id}"
            assert body["next_action"] == poll
        case "SESSION_NOT_READY":
            assert body["appointment_id"] == place.appointment_id
            assert body["next_action"] == poll
            parked = place.appointment is not None and place.appointment[1]
            assert body["retry_after"] == 3600 if parked else 590 < body["retry_after"] <= 600
        case _:
            assert not {"appointment_id", "session_id", "session_context", "next_action"} & body.keys()


@pytest.mark.parametrize("flags", ALL_FLAGS, ids=lambda flags: "".join("01"[flags[flag]] for flag in Flag))
async def test_every_chat_operation_is_answered_as_promised(
    make_api: MakeApi, clinic: Clinic, owner: Owner, flags: Flags
) -> None:
    api = await make_api(**{flag.value: flags[flag] for flag in Flag})
    verdicts: Counter[tuple[str, str, str]] = Counter()
    legacy = 0

    async def ask(place: Place, *, harmless: bool) -> None:
        """Performs what will be refused, and would leave no trace; or all the rest."""
        nonlocal legacy
        overdue = place.session == ("waiting", True)  # the refusal stores the expiry
        for spelling, (operation, (perform, success)) in product(place.spellings, OPERATIONS.items()):
            answer, _ = promised(place.case(operation, spelling, flags))
            if (answer in REFUSALS and not overdue) is not harmless:
                continue
            check(place, await perform(api, place, place.identifier(spelling)), answer, success)
            word, _, reason = answer.rpartition(": ")
            verdicts[operation, *(("allowed", "none") if answer == "allowed" else (word or "refused", reason))] += 1
            legacy += spelling == "legacy spelling"

    everywhere = await places(clinic)
    before = await rows(owner)
    await asyncio.gather(*(ask(place, harmless=True) for place in everywhere))
    assert await rows(owner) == before, "A refusal left a trace."
    await asyncio.gather(*(ask(place, harmless=False) for place in everywhere))

    sample = api.runtime.metrics.sample
    for (operation, verdict, reason), count in verdicts.items():
        assert sample("guard_verdicts_total", operation=operation, verdict=verdict, reason=reason) == count
        if reason == "SESSION_CONTEXT_REQUIRED" and verdict == "refused":
            assert sample("chat_blocked_session_context_required_total", operation=operation) == count
    for operation in OPERATIONS:
        asked = sum(count for (asked_for, _, _), count in verdicts.items() if asked_for == operation)
        assert sample("chat_requests_total", operation=operation) == asked
    assert sample("legacy_identifier_total") == legacy
    # Chat alone starts nothing live.
    assert await clinic.fetchval("SELECT count(*) FROM sessions") == len(SESSIONS)


async def send(api: Api, caller: Principal, identifier: object, text: str = "Hello") -> Response:
    message = {"client_message_id": f"{identifier} {text}", "body": text}
    return await api.as_(caller).post(f"/chat/{identifier}/messages", json=message)


async def read(api: Api, caller: Principal, identifier: object) -> Response:
    return await api.as_(caller).get(f"/chat/{identifier}/messages")


async def test_who_waits_for_a_due_appointment_asks_again_after_a_second(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=-10 * MINUTE)
    assert problem(await send(api, patient, appointment_id), 403, "SESSION_NOT_READY")["retry_after"] == 1


async def test_what_was_said_before_the_session_is_part_of_it(make_api: MakeApi, clinic: Clinic) -> None:
    api = await make_api(ALLOW_LEGACY_APPOINTMENT_CHAT=True)
    patient, doctor = await clinic.patient(), await clinic.doctor()
    appointment_id = await clinic.appointment(doctor, patient)
    found(await send(api, patient, appointment_id, "one"), 201)
    found(await send(api, doctor, appointment_id, "two"), 201)
    await clinic.convert()
    context = found(await api.as_(patient).get(f"/appointments/{appointment_id}/session"))["session_context"]
    assert found(await send(api, patient, context, "three"), 201)["seq"] == 3
    assert found(await send(api, doctor, appointment_id, "four"), 201)["seq"] == 4
    items = found(await read(api, doctor, context))["items"]
    assert [(item["seq"], item["body"]) for item in items] == [(1, "one"), (2, "two"), (3, "three"), (4, "four")]


async def test_refusals_come_in_the_promised_order(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    patient, stranger = api.as_(live.patient), api.as_(await clinic.patient())
    json = {"content-type": "application/json"}
    sound = f"/chat/{live.context}/messages"

    # Token, size, syntax, identifier, schema, taking part, role, flags: each with everything after it wrong too.
    anonymous = await api.anonymous.post("/api/v1/chat/nonsense/messages", content=b"x" * 70_000, headers=json)
    problem(anonymous, 401, "UNAUTHENTICATED")
    problem(
        await patient.post("/chat/nonsense/messages", content=b"x" * 70_000, headers=json), 413, "PAYLOAD_TOO_LARGE"
    )
    problem(await patient.post("/chat/nonsense/messages", content=b"x", headers=json), 400, "VALIDATION_FAILED")
    problem(await patient.post("/chat/nonsense/messages", json={}), 400, "SESSION_CONTEXT_INVALID")
    by_appointment = f"/sessions/{live.appointment_id}/end"
    problem(await patient.post(by_appointment, json={"reason": 7}), 400, "SESSION_CONTEXT_INVALID")
    problem(await stranger.post(sound, json={}), 422, "VALIDATION_FAILED")
    problem(await send(api, clinic.operator, live.appointment_id), 403, "ROLE_NOT_ALLOWED")
    found(await patient.post(f"/sessions/{live.context}/end"))
    problem(await send(api, live.patient, live.appointment_id), 400, "SESSION_CONTEXT_REQUIRED")
    problem(await send(api, live.patient, live.context), 409, "SESSION_NOT_ACTIVE")


async def test_an_appointment_far_ahead_is_not_ready_either(api: Api, clinic: Clinic) -> None:
    patient = await clinic.patient()
    appointment_id = await clinic.appointment(patient=patient, starts_in=30 * DAY)
    wait = problem(await read(api, patient, appointment_id), 403, "SESSION_NOT_READY")["retry_after"]
    assert wait == pytest.approx(30 * 86400, abs=10)
