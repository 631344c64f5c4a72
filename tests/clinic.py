"""A clinic to test with: people, appointments in any state, sessions, and the parts of a worker."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from libs.domain.catalogue import CATALOGUE
from libs.domain.conversion.report import Reporter
from libs.domain.conversion.runs import Converter, Outcome, Run
from libs.domain.db import Database
from libs.domain.jobs import Job
from libs.domain.legacy.triggers import Triggers
from libs.domain.notifications import Notifications
from libs.domain.outbox.dispatch import Dispatcher
from libs.domain.outbox.events import Consumer, Lane
from libs.domain.people import NewSubscription, create_tenant, create_user, subscribe
from libs.domain.sessions.settlement import Settled, Settlement
from libs.domain.transaction import transaction
from libs.guardrails import FixedFlags, Flags, FlagSource, Principal, Role, SessionKind, SessionRef
from libs.observability.registry import Metrics

MINUTE = timedelta(minutes=1)

ACTIVATE = """
    UPDATE sessions SET status = 'active', activated_at = clock(), allowance_units = 10,
        expires_at = clock() + interval '100 minutes', tick_at = clock() + interval '10 minutes'
"""
"""What the doctor's first message does to text sessions."""

RING = "UPDATE sessions SET rung_by = $1, response_deadline = clock() + interval '90 seconds' WHERE id = $2"

ANSWER = """
    UPDATE sessions SET status = 'active', activated_at = clock(), tick_at = clock(),
        idle_at = clock() + interval '2 minutes'
"""
"""What answering does to a call that rings."""


class RecordingBell:
    """Keeps what was rung for."""

    def __init__(self) -> None:
        self.rung: list[Job] = []
        self.conversations: list[int] = []
        self.typists: list[tuple[int, int, bool]] = []

    def ring(self, job: Job) -> None:
        self.rung.append(job)

    def changed(self, conversation_id: int) -> None:
        self.conversations.append(conversation_id)

    def typing(self, conversation_id: int, user_id: int, *, on: bool) -> None:
        self.typists.append((conversation_id, user_id, on))


@dataclass(frozen=True)
class LiveSession:
    """A session just converted, and who takes part in it."""

    ref: SessionRef
    appointment_id: int
    patient: Principal
    doctor: Principal

    @property
    def context(self) -> str:
        return str(self.ref)


class Clinic:
    """One tenant. What a test does not care about is sensible: active people, units, free slots."""

    def __init__(self, database: Database, tenant_id: int) -> None:
        self.database = database
        self.tenant_id = tenant_id
        self.bell = RecordingBell()
        self.metrics = Metrics(CATALOGUE, version="test", service="tests")
        self.operator: Principal

    @classmethod
    async def open(cls, database: Database, name: str = "Clinic") -> Self:
        async with transaction(database, RecordingBell()) as tx:
            tenant_id = await create_tenant(tx, name)
        clinic = cls(database, tenant_id)
        clinic.operator = await clinic.person(Role.OPERATOR)
        return clinic

    async def person(self, role: Role, *, country: str = "MW", active: bool = True) -> Principal:
        async with transaction(self.database, self.bell) as tx:
            user = await create_user(tx, self.tenant_id, role=role, name=f"A {role}", country=country, active=active)
        return Principal(user.id, self.tenant_id, role)

    async def doctor(self, **options: Any) -> Principal:
        return await self.person(Role.DOCTOR, **options)

    async def patient(self, *, units: int | None = 10, **options: Any) -> Principal:
        """`units` of each modality; None leaves the patient without a subscription."""
        patient = await self.person(Role.PATIENT, **options)
        if units is not None:
            await self.subscribe(patient, units)
        return patient

    async def subscribe(self, patient: Principal, units: int = 10, *, days: int = 30) -> None:
        async with self.database.autocommit() as connection:
            now = await connection.fetchval("SELECT clock()")
        async with transaction(self.database, self.bell) as tx:
            await subscribe(
                tx,
                self.tenant_id,
                NewSubscription(
                    patient_id=patient.user_id,
                    plan="basic",
                    starts_at=now - timedelta(days=1),
                    ends_at=now + timedelta(days=days),
                    text_sessions_remaining=units,
                    voice_calls_remaining=units,
                    video_calls_remaining=units,
                ),
            )

    async def appointment(
        self,
        doctor: Principal | None = None,
        patient: Principal | None = None,
        *,
        starts_in: timedelta = -MINUTE,
        lasts: timedelta = 30 * MINUTE,
        modality: str = "text",
        status: str = "CONFIRMED",
    ) -> int:
        """Inserts an appointment as an import would: any state, any time, the slot taken if it is free."""
        doctor = doctor or await self.doctor()
        patient = patient or await self.patient()
        async with self.database.autocommit() as connection:
            appointment_id: int = await connection.fetchval(
                """
                WITH a AS (
                    INSERT INTO appointments (tenant_id, patient_id, doctor_id, modality, status, starts_at, ends_at)
                    VALUES ($1, $2, $3, $4, $5, clock() + $6, clock() + $6 + $7)
                    RETURNING id, tenant_id, doctor_id, starts_at, ends_at
                ), slot AS (
                    INSERT INTO busy_intervals (tenant_id, doctor_id, appointment_id, during)
                    SELECT tenant_id, doctor_id, id, tstzrange(starts_at, greatest(starts_at, ends_at)) FROM a
                    WHERE $5 IN ('PENDING', 'CONFIRMED', 'RESCHEDULE_PROPOSED') ON CONFLICT DO NOTHING
                )
                SELECT id FROM a
                """,
                self.tenant_id,
                patient.user_id,
                doctor.user_id,
                modality,
                status,
                starts_in,
                lasts,
            )
        return appointment_id

    async def session(self, modality: str = "text", **appointment: Any) -> LiveSession:
        """A session made from an appointment by conversion."""
        doctor = appointment.pop("doctor", None) or await self.doctor()
        patient = appointment.pop("patient", None) or await self.patient()
        appointment_id = await self.appointment(doctor, patient, modality=modality, **appointment)
        await self.convert()
        session_id = await self.fetchval("SELECT session_id FROM appointments WHERE id = $1", appointment_id)
        assert session_id is not None, "The appointment was not converted."
        kind = SessionKind.TEXT if modality == "text" else SessionKind.CALL
        return LiveSession(SessionRef(kind, session_id), appointment_id, patient, doctor)

    async def begin(self, session: LiveSession, *, ago: timedelta = timedelta(), allowance: int = 10) -> None:
        """Makes the session active and its units run, as if since so long ago."""
        await self.fetchval(
            """
            UPDATE sessions SET status = 'active', activated_at = clock() - $2::interval,
                connected_at = CASE kind WHEN 'call' THEN clock() - $2::interval END, allowance_units = $3,
                expires_at = clock() - $2::interval + $3::int * interval '10 minutes', tick_at = clock()
            WHERE id = $1
            """,
            session.ref.id,
            ago,
            allowance,
        )

    async def message(self, session: LiveSession, body: str = "Hello", sender: Principal | None = None) -> int:
        """Stores a message, by the patient unless told otherwise; its id."""
        message_id: int = await self.fetchval(
            """
            WITH numbered AS (
                UPDATE conversations SET last_seq = last_seq + 1 WHERE session_id = $1 RETURNING id, tenant_id, last_seq
            )
            INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body)
            SELECT tenant_id, id, last_seq, $2, 'stored ' || last_seq, 'text', $3 FROM numbered
            RETURNING id
            """,
            session.ref.id,
            (sender or session.patient).user_id,
            body,
        )
        return message_id

    def converter(self, outcomes: list[Outcome] | None = None, **options: Any) -> Converter:
        """A converter that counts in `self.metrics`; `outcomes` gets all it made."""
        report = Reporter(self.metrics).batch

        def on_batch(run: Run, batch: list[Outcome], began_ns: int) -> None:
            report(run, batch, began_ns)
            if outcomes is not None:
                outcomes.extend(batch)

        return Converter(self.database, on_batch, worker="tests", counts=True, **options)

    async def convert(self) -> dict[int, Outcome]:
        """One run over what is due; the outcomes by appointment."""
        outcomes: list[Outcome] = []
        await self.converter(outcomes).auto_start(wait=True)
        return {outcome.appointment_id: outcome for outcome in outcomes}

    def triggers(self, flags: FlagSource | None = None) -> Triggers:
        """The two legacy commands, for which all flags are off unless told otherwise."""
        return Triggers(self.database, self.bell, flags or FixedFlags(Flags()), self.metrics, self.converter())

    async def settle(self) -> list[Settled]:
        """Settles the sessions that are due, as a worker's beat does."""
        async with transaction(self.database, self.bell) as tx:
            return await Settlement(self.metrics).due(tx)

    async def dispatch(self) -> int:
        """Dispatches the outbox until it has nothing that can be dispatched now; answers how much that was."""
        dispatcher = Dispatcher(self.database, {Consumer.NOTIFICATIONS: Notifications(self.database)}, self.metrics)
        dispatched = 0
        while taken := sum([await dispatcher.dispatch(lane) for lane in (Lane.URGENT, Lane.NORMAL)]):
            dispatched += taken
        return dispatched

    async def fetch(self, sql: str, *parameters: Any) -> list[Any]:
        async with self.database.autocommit() as connection:
            return list(await connection.fetch(sql, *parameters))

    async def fetchrow(self, sql: str, *parameters: Any) -> Any:
        async with self.database.autocommit() as connection:
            return await connection.fetchrow(sql, *parameters)

    async def fetchval(self, sql: str, *parameters: Any) -> Any:
        async with self.database.autocommit() as connection:
            return await connection.fetchval(sql, *parameters)
