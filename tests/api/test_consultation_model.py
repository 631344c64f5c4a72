"""Whatever people, workers and old clients do with a consultation, in whatever order and whatever breaks off in
between: it is charged what the model says, and every invariant holds after every step."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import asyncpg
import pytest
from httpx2 import Response
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from libs.domain.appointments.expiry import expire_pending
from libs.domain.db import is_transient
from libs.domain.invariants import violations
from libs.domain.transaction import transaction
from libs.guardrails import Principal
from tests.api.consultation import LASTS, Answer, Consultation
from tests.api.expect import ahead
from tests.clinic import Clinic
from tests.clock import Clock
from tests.conftest import MakeApi
from tests.running import Api

T = TypeVar("T")

PARTIES = st.sampled_from(["patient", "doctor"])
WHO = st.sampled_from(["patient", "doctor", "operator"])
SECONDS = st.sampled_from([30, 60, 120, 300, 600, 600, 1500])
LEGACY = st.sampled_from(["end", "pay", "interval", "manual_end", "no_activity"])
BREAKS = st.sampled_from([False, False, True])
"""Whether every connection to the database is cut while something is done."""
FOR_EVER = 10**8

_CUT = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name <> 'invariants'
"""
_STATE = """
    SELECT a.status AS appointment, s.status AS session, coalesce(s.units_charged, 0) AS units,
        (SELECT CASE a.modality WHEN 'text' THEN sum(text_sessions_remaining) ELSE sum(voice_calls_remaining) END
         FROM subscriptions WHERE patient_id = a.patient_id)::int AS left,
        (SELECT coalesce(sum(balance), 0)::int / 350000 FROM wallets WHERE doctor_id = a.doctor_id) AS paid,
        (SELECT count(*) FROM ledger_transactions WHERE appointment_id = a.id AND kind = 'legacy') AS legacy
    FROM appointments a LEFT JOIN sessions s ON s.appointment_id = a.id WHERE a.id = $1
"""


@dataclass
class World:
    """What the machine acts on, from outside of the event loop in which it runs."""

    api: Api
    clinic: Clinic
    clock: Clock
    owner: "asyncpg.Connection[Any]"
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)


class Life(RuleBasedStateMachine):
    """One appointment of a patient and a doctor, from its booking to what is taken back at last."""

    world: ClassVar[World]

    @initialize(modality=st.sampled_from(["text", "voice"]), units=st.integers(1, 4))
    def book(self, modality: str, units: int) -> None:
        clinic, run = self.world.clinic, self.world.run
        doctor, patient = run(clinic.doctor()), run(clinic.patient(units=units))
        self.people: dict[str, Principal] = {"patient": patient, "doctor": doctor, "operator": clinic.operator}
        self.asked = 0
        wanted: dict[str, Any] = {
            "doctor_id": doctor.user_id,
            "modality": modality,
            "starts_at": run(ahead(clinic, timedelta(seconds=60))),
            "duration_minutes": LASTS // 60,
        }
        booked = self.post("patient", "/appointments", wanted)
        assert booked.status_code == 201, booked.text
        self.appointment_id = booked.json()["id"]
        self.context: str | None = None
        self.model = Consultation(modality, units, starts_at=60)

    def post(self, who: str, path: str, body: Any = None, *, breaks: bool = False) -> Response:
        """The answer, once there is one. What breaks off is sent again under the same key, as a client would."""
        self.asked += 1
        caller = self.people[who]
        url = f"{self.world.api.url}{path}" if path.startswith("/api/") else path
        headers = {"Idempotency-Key": f"{id(self)}-{self.asked}"}

        async def ask() -> Response | None:
            answer = await self.world.api.as_(caller).post(url, json=body, headers=headers)
            return None if answer.status_code >= 500 else answer

        return self.world.run(self.insist(ask, breaks=breaks))

    async def insist(self, do: Callable[[], Awaitable[T | None]], *, breaks: bool) -> T:
        """Does it until it is done; the first time, if it `breaks`, connections are cut meanwhile."""
        for _ in range(5):
            cutting = asyncio.create_task(self.cut()) if breaks else None
            try:
                done = await do()
            except Exception as error:
                if not is_transient(error):
                    raise
                done = None
            if cutting:
                await cutting
            if done is not None:
                return done
            breaks = False
        raise AssertionError("It was never done.")

    async def cut(self) -> None:
        await asyncio.sleep(0.001 * (self.asked % 7))
        await self.world.owner.execute(_CUT)

    def check(self, response: Response, expected: Answer, read: Callable[[Any], Any], *, broke: bool) -> None:
        """Compares the answer with the model's. Of what broke off, the first answer may have been lost, and the
        second one then says that nothing was left to do: there the state alone is compared."""
        body: Any = response.json() if response.content else None
        said = body["code"] if response.status_code >= 400 else read(body)
        if not broke:
            assert (response.status_code, said) == expected, response.text

    @rule(breaks=BREAKS)
    def confirm(self, breaks: bool) -> None:
        expected = self.model.confirm()
        answer = self.post("doctor", f"/appointments/{self.appointment_id}/confirm", breaks=breaks)
        self.check(answer, expected, lambda body: body["status"], broke=breaks)

    @rule(breaks=BREAKS)
    def beat(self, breaks: bool) -> None:
        """What a worker does, from settling to converting."""
        clinic = self.world.clinic

        async def do() -> bool:
            await clinic.settle()
            async with transaction(clinic.database, clinic.bell) as tx:
                await expire_pending(tx)
            await clinic.convert()
            return True

        self.world.run(self.insist(do, breaks=breaks))
        self.model.convert()
        if self.model.session and self.context is None:
            find = "SELECT kind || '_session:' || id FROM sessions WHERE appointment_id = $1"
            self.context = self.world.run(self.world.owner.fetchval(find, self.appointment_id))

    @rule(breaks=BREAKS)
    def tick(self, breaks: bool) -> None:
        clinic = self.world.clinic

        async def do() -> bool:
            await clinic.settle()
            return True

        self.world.run(self.insist(do, breaks=breaks))
        self.model.tick()

    @rule(seconds=SECONDS)
    def pass_time(self, seconds: int) -> None:
        self.world.run(self.world.clock.advance(timedelta(seconds=seconds)))
        self.model.pass_time(seconds)

    @precondition(lambda self: self.context)
    @rule(by=PARTIES)
    def say(self, by: str) -> None:
        message = {"client_message_id": str(self.asked), "body": "Good morning"}
        answer = self.post(by, f"/chat/{self.context}/messages", message)
        self.check(answer, self.model.say(by), lambda body: None, broke=False)

    @precondition(lambda self: self.context and self.model.modality == "voice")
    @rule(by=PARTIES, what=st.sampled_from(["ring", "answer", "connected", "connected", "decline"]), breaks=BREAKS)
    def call(self, by: str, what: str, breaks: bool) -> None:
        expected = {
            "ring": lambda: self.model.ring(by),
            "answer": lambda: self.model.answer(by),
            "connected": self.model.connect,
            "decline": self.model.decline,
        }[what]()
        answer = self.post(by, f"/sessions/{self.context}/{what}", breaks=breaks)
        self.check(answer, expected, lambda body: body["status"], broke=breaks)

    @precondition(lambda self: self.model.session in ("waiting", "connecting"))
    @rule()
    def begin(self) -> None:
        """The short way to where units run."""
        if self.model.modality == "text":
            self.say("doctor")
        else:
            for by, what in [("patient", "ring"), ("doctor", "answer"), ("patient", "connected")]:
                self.call(by, what, breaks=False)

    @precondition(lambda self: self.context)
    @rule(who=WHO, breaks=BREAKS)
    def deduct(self, who: str, breaks: bool) -> None:
        expected = self.model.deduct()
        answer = self.post(who, f"/sessions/{self.context}/deductions", breaks=breaks)
        self.check(answer, expected, lambda body: (body["units_charged"], body["units_added"]), broke=breaks)

    @precondition(lambda self: self.context)
    @rule(who=WHO, breaks=BREAKS)
    def end(self, who: str, breaks: bool) -> None:
        expected = self.model.end()
        answer = self.post(who, f"/sessions/{self.context}/end", breaks=breaks)
        self.check(
            answer,
            expected,
            lambda body: (body["already_ended"], body["billing"]["units_charged"], body["billing"]["units_added"]),
            broke=breaks,
        )

    @rule(who=WHO, how=LEGACY, asked=st.integers(1, 4), breaks=BREAKS)
    def bill(self, who: str, how: str, asked: int, breaks: bool) -> None:
        expected = self.model.bill(how, asked)
        match how:
            case "end":
                answer = self.post(who, f"/api/appointments/{self.appointment_id}/end-session", breaks=breaks)
            case "pay":
                answer = self.post(who, f"/api/appointments/{self.appointment_id}/process-payment", breaks=breaks)
            case _:
                body = {"appointment_id": self.appointment_id, "sessions_to_deduct": asked, "reason": how}
                answer = self.post(who, "/api/text-appointments/process-deduction", body, breaks=breaks)
        self.check(
            answer,
            expected,
            lambda body: (body["status"], body["units_charged"], body["units_added"]),
            broke=breaks,
        )

    @rule(by_appointment=st.booleans(), unit=st.sampled_from([None, 1, 2, 3]), breaks=BREAKS)
    def refund(self, by_appointment: bool, unit: int | None, breaks: bool) -> None:
        if not by_appointment and self.context is None:
            return
        subject = {"context": str(self.appointment_id) if by_appointment else self.context}
        expected = self.model.refund(by_appointment=by_appointment, unit=unit)
        answer = self.post("operator", "/admin/refunds", subject | ({"unit": unit} if unit else {}), breaks=breaks)
        self.check(answer, expected, lambda body: body["units_refunded"], broke=breaks)

    @invariant()
    def is_as_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        row = self.world.run(self.world.owner.fetchrow(_STATE, self.appointment_id))
        assert row is not None
        model = self.model
        expected = (model.appointment, model.session, len(model.charges), model.left, model.paid, len(model.legacy))
        assert tuple(row) == expected
        assert self.world.run(violations(self.world.owner)) == {}


@pytest.fixture
async def world(make_api: MakeApi, clinic: Clinic, clock: Clock, owner: "asyncpg.Connection[Any]") -> World:
    api = await make_api(
        chat_messages_per_minute=100_000,
        text_inactivity_seconds=FOR_EVER,
        call_inactivity_seconds=FOR_EVER,
        log_level="ERROR",
    )
    return World(api, clinic, clock, owner, asyncio.get_running_loop())


@pytest.mark.timeout(3600)
def test_a_consultation_costs_what_the_model_says(request: pytest.FixtureRequest, world: World) -> None:
    full = request.config.getoption("--storm") == "full"
    machine = type("LifeInThisWorld", (Life,), {"world": world})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=300 if full else 25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
