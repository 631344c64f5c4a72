"""A good request for every operation of the API, for tests that spoil one part of it."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias
from uuid import uuid4

import asyncpg
from httpx2 import Response

from libs.domain.tables import metadata
from libs.guardrails import Principal
from services.api.public import PUBLIC
from tests.api.expect import DAY, ahead, problem
from tests.clinic import ACTIVATE, ANSWER, MINUTE, RING, Clinic
from tests.running import Api, token_of

Owner: TypeAlias = "asyncpg.Connection[Any]"

CANARY: Final = "canary-5e1f"
"""Part of whatever is sent and must not come back."""


@dataclass(frozen=True)
class Call:
    """A request that is good in all its parts, so that a test can make one of them bad."""

    method: str
    template: str
    described: dict[str, Any]
    caller: Principal
    values: dict[str, str]
    body: dict[str, Any] = field(default_factory=dict)

    def path(self, **values: str) -> str:
        return self.template.format_map(self.values | values)

    @property
    def takes_body(self) -> bool:
        return self.method not in {"GET", "DELETE"}  # if only to refuse one with anything in it

    @property
    def needs_body(self) -> bool:
        return bool(self.described.get("requestBody", {}).get("required"))

    def parameters(self, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for parameter in self.described.get("parameters", ()):
            if parameter["in"] == where:
                yield parameter["name"], parameter["schema"]

    async def send(
        self, api: Api, path: str | None = None, *, caller: Principal | None = None, **request: Any
    ) -> Response:
        """Sends it, or what is given instead of a part of it."""
        if not request and self.body:
            request = {"json": self.body}
        token = {"Authorization": f"Bearer {token_of(caller or self.caller)}"}
        headers = token | request.pop("headers", {})
        return await api.anonymous.request(self.method, path or self.path(), headers=headers, **request)

    async def refused(self, api: Api, path: str | None = None, **request: Any) -> dict[str, Any]:
        """The problem that answers a bad request: documented, complete, and without anything that was sent."""
        response = await self.send(api, path, **request)
        said = f"{self.method} {path or self.template} {str(request)[:200]}: {response.status_code} {response.text}"
        assert 400 <= response.status_code < 500, said
        assert str(response.status_code) in self.described["responses"], said
        body = problem(response, response.status_code, response.json()["code"])
        repeated = str(body | {"instance": ""})
        assert CANARY not in repeated, said
        assert "9" * 9 not in repeated, said
        return body


async def calls_of(api: Api, clinic: Clinic) -> list[Call]:
    """A good request for every operation of the schema, each with an appointment or a session of its own."""
    patient, doctor = await clinic.patient(), await clinic.doctor()
    new_time = await ahead(clinic, 9 * DAY)
    days = iter(range(1, 100))

    async def appointment(status: str) -> dict[str, str]:
        appointment_id = await clinic.appointment(doctor, patient, status=status, starts_in=next(days) * DAY)
        if status == "RESCHEDULE_PROPOSED":
            await clinic.fetch(
                "UPDATE appointments SET proposed_starts_at = starts_at + interval '1 hour' WHERE id = $1",
                appointment_id,
            )
        return {"appointment_id": str(appointment_id)}

    def on(message_id: int) -> dict[str, str]:
        return {"context": chatting.context, "message_id": str(message_id)}

    shown, chatting, ending, running, billed = [await clinic.session() for _ in range(5)]
    await clinic.fetch(f"{ACTIVATE} WHERE id = $1", running.ref.id)
    await clinic.begin(billed, ago=11 * MINUTE)
    await clinic.settle()
    ringing, answering, connecting, declining = [await clinic.session("voice") for _ in range(4)]
    for call in (answering, connecting):
        await clinic.fetch(RING, call.doctor.user_id, call.ref.id)
    await clinic.fetch(f"{ANSWER} WHERE id = $1", connecting.ref.id)
    # Due, and for want of a worker without a session.
    ended, paid, deducted = [await clinic.appointment(doctor, patient, starts_in=-MINUTE) for _ in range(3)]
    subscription = {
        "patient_id": patient.user_id,
        "plan": "basic",
        "starts_at": await ahead(clinic, DAY),
        "ends_at": await ahead(clinic, 2 * DAY),
        "text_sessions_remaining": 1,
        "voice_calls_remaining": 1,
        "video_calls_remaining": 1,
    }
    booking = {
        "doctor_id": doctor.user_id,
        "patient_id": patient.user_id,
        "modality": "text",
        "starts_at": await ahead(clinic, 200 * DAY),
        "duration_minutes": 30,
        "reason": "a cough",
    }
    message = {"client_message_id": "1", "body": "Hello", "kind": "text", "media_url": "https://example.org/1"}
    stored = [await clinic.message(chatting, str(number)) for number in range(3)]
    reply = {"client_message_id": "2", "body": "Good morning"}
    webhooks = api.as_(clinic.operator)

    def webhook(name: str) -> dict[str, Any]:
        return {"url": f"https://example.org/{name}/{uuid4()}", "description": "ours", "events": ["session_started"]}

    async def register(name: str) -> str:
        return str((await webhooks.post("/admin/webhooks", json=webhook(name))).json()["id"])

    webhook_id = await register("used")
    delivery_id = str((await webhooks.post(f"/admin/webhooks/{webhook_id}/test")).json()["id"])
    user = {"role": "doctor", "name": "Grace", "country": "MW", "active": True}
    operator = clinic.operator
    good: dict[str, tuple[Principal, dict[str, str], dict[str, Any]]] = {
        "get_me": (patient, {}, {}),
        "list_doctors": (patient, {}, {}),
        "book_appointment": (patient, {}, booking),
        "list_appointments": (patient, {}, {}),
        "get_appointment": (patient, await appointment("PENDING"), {}),
        "confirm_appointment": (doctor, await appointment("PENDING"), {}),
        "cancel_appointment": (patient, await appointment("CONFIRMED"), {"reason": "well again"}),
        "propose_new_time": (doctor, await appointment("CONFIRMED"), {"starts_at": new_time}),
        "accept_new_time": (patient, await appointment("RESCHEDULE_PROPOSED"), {}),
        "reject_new_time": (patient, await appointment("RESCHEDULE_PROPOSED"), {}),
        "report_presence": (patient, await appointment("CONFIRMED"), {}),
        "poll_session": (patient, await appointment("CONFIRMED"), {}),
        "list_sessions": (patient, {}, {}),
        "get_session": (shown.patient, {"context": shown.context}, {}),
        "start_session": (
            await clinic.patient(),
            {},
            {"doctor_id": (await clinic.doctor()).user_id, "modality": "voice", "reason": "a cough"},
        ),
        "ring_call": (ringing.patient, {"context": ringing.context}, {}),
        "answer_call": (answering.patient, {"context": answering.context}, {}),
        "connect_call": (connecting.patient, {"context": connecting.context}, {}),
        "decline_call": (declining.patient, {"context": declining.context}, {}),
        "end_session": (ending.patient, {"context": ending.context}, {"reason": "all is said"}),
        "deduct_interval": (running.patient, {"context": running.context}, {}),
        "end_session_by_appointment": (patient, {"appointment_id": str(ended)}, {}),
        "process_payment": (patient, {"appointment_id": str(paid)}, {}),
        "process_deduction": (
            patient,
            {},
            {"appointment_id": deducted, "sessions_to_deduct": 1, "reason": "manual_end"},
        ),
        "get_session_billing": (billed.patient, {"context": billed.context}, {}),
        "get_balance": (patient, {}, {}),
        "create_refund": (operator, {}, {"context": billed.context, "unit": 1, "reason": "it was cut off"}),
        "send_message": (chatting.patient, {"context": chatting.context}, message),
        "get_messages": (chatting.patient, {"context": chatting.context}, {}),
        "reply_to_message": (chatting.patient, on(stored[0]), reply),
        "add_reaction": (chatting.patient, on(stored[1]) | {"emoji": "%F0%9F%91%8D"}, {}),
        "remove_reaction": (chatting.doctor, on(stored[2]) | {"emoji": "%F0%9F%91%8D"}, {}),
        "start_typing": (chatting.patient, {"context": chatting.context}, {}),
        "stop_typing": (chatting.patient, {"context": chatting.context}, {}),
        "mark_as_read": (chatting.patient, {"context": chatting.context}, {"seq": 1}),
        "list_notifications": (patient, {}, {}),
        "create_socket_ticket": (chatting.patient, {}, {"context": chatting.context}),
        "create_user": (operator, {}, user),
        "change_user": (operator, {"user_id": str((await clinic.doctor()).user_id)}, {"active": False}),
        "create_subscription": (operator, {}, subscription),
        "get_conversions": (operator, {}, {}),
        "get_rollout": (operator, {}, {}),
        "list_decisions": (operator, {}, {}),
        "list_audit_log": (operator, {}, {}),
        "list_alerts": (operator, {}, {}),
        "list_chat_alerts": (operator, {}, {}),
        "list_dead_deliveries": (operator, {}, {}),
        "replay_dead_delivery": (operator, {"delivery_id": await dead_delivery(clinic)}, {}),
        "register_webhook": (operator, {}, webhook("registered")),
        "list_webhooks": (operator, {}, {}),
        "get_webhook": (operator, {"webhook_id": webhook_id}, {}),
        "change_webhook": (
            operator,
            {"webhook_id": webhook_id},
            {"enabled": True, "description": "theirs", "events": ["session_ended"]},
        ),
        "rotate_webhook_secret": (operator, {"webhook_id": webhook_id}, {}),
        "list_webhook_deliveries": (operator, {"webhook_id": webhook_id}, {}),
        "redeliver_to_webhook": (operator, {"webhook_id": webhook_id, "delivery_id": delivery_id}, {}),
        "test_webhook": (operator, {"webhook_id": webhook_id}, {}),
        "remove_webhook": (operator, {"webhook_id": await register("removed")}, {}),
        "list_flags": (operator, {}, {}),
        "set_flag": (
            operator,
            {"flag": "ENFORCE_SESSION_GATED_CHAT"},
            {"enabled": True, "tripwire": {"share": 0.1, "minutes": 5, "minimum": 50}},
        ),
    }
    described = {
        operation["operationId"]: (method.upper(), template, operation)
        for template, methods in api.app.openapi()["paths"].items()
        for method, operation in methods.items()
        if template not in PUBLIC
    }
    assert good.keys() == described.keys(), "Each operation needs a good request here."
    return [Call(*described[name], *request) for name, request in good.items()]


async def dead_delivery(clinic: Clinic) -> str:
    """The id of a delivery that was given up; for nobody who would notice."""
    dead: int = await clinic.fetchval(
        """
        WITH event AS (
            INSERT INTO outbox_events (tenant_id, name, aggregate, payload)
            VALUES ($1, 'ping', 'test:1', '{}') RETURNING id
        )
        INSERT INTO outbox_deliveries (event_id, consumer, lane, aggregate, dead_at)
        SELECT id, 'test', 'webhooks', 'test:1', clock() FROM event RETURNING id
        """,
        clinic.tenant_id,
    )
    return str(dead)


RECORDS: Final = {"decisions", "decision_totals"}
"""Tables of what was decided, be it a refusal: they are written whatever becomes of a request."""

CONNECTIONS: Final = {"api_processes", "socket_slots"}
"""Tables of who is connected: they are written by the clock, and after sockets are closed."""


async def rows(owner: Owner) -> dict[str, Any]:
    """A fingerprint of all rows of every table, but for the decision log and who is connected."""
    whole = "SELECT md5(string_agg(t::text, '/' ORDER BY t::text)) FROM {} t"
    return {name: await owner.fetchval(whole.format(name)) for name in metadata.tables.keys() - RECORDS - CONNECTIONS}


@asynccontextmanager
async def harmless(api: Api, clinic: Clinic, owner: Owner) -> AsyncIterator[list[Call]]:
    """Good requests to spoil. Whatever is sent must leave no trace, and the good ones are accepted afterwards:
    what was spoiled was the only thing wrong."""
    calls = await calls_of(api, clinic)
    before = await rows(owner)
    yield calls
    assert await rows(owner) == before
    for call in calls:
        response = await call.send(api)
        assert 200 <= response.status_code < 300, f"{call.method} {call.path()}: {response.text}"
    assert await rows(owner) != before
