"""The usual way to write a conversion: load each due appointment, check it, add objects, commit."""

import time
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import registry

from libs.domain import tables

_mapping = registry()


class _Row:
    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def _mapped(table: Any) -> Any:
    cls = type(table.name.title(), (_Row,), {})
    _mapping.map_imperatively(cls, table)
    return cls


Appointment, Session, Conversation, Participant, Attempt, Event, Delivery, User, Subscription = map(
    _mapped,
    (
        tables.appointments,
        tables.sessions,
        tables.conversations,
        tables.participants,
        tables.conversion_attempts,
        tables.outbox_events,
        tables.outbox_deliveries,
        tables.users,
        tables.subscriptions,
    ),
)


async def convert_row_by_row(url: str, rows: int) -> float:
    """Converts the first `rows` due appointments; answers how many per second."""
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with sessions() as session:
        due = (
            await session.scalars(
                select(Appointment.id)
                .where(Appointment.status == "CONFIRMED", Appointment.session_id.is_(None))
                .where(Appointment.starts_at <= func.clock())
                .order_by(Appointment.starts_at, Appointment.id)
                .limit(rows)
            )
        ).all()
    began = time.perf_counter()
    for appointment_id in due:
        async with sessions() as session, session.begin():
            await _convert(session, appointment_id)
    took = time.perf_counter() - began
    await engine.dispose()
    return len(due) / took


async def _convert(session: AsyncSession, appointment_id: int) -> None:
    appointment: Any = await session.get(Appointment, appointment_id, with_for_update={"skip_locked": True})
    if appointment is None or appointment.session_id is not None:
        return
    patient = await session.get_one(User, appointment.patient_id)
    doctor = await session.get_one(User, appointment.doctor_id)
    now = datetime.now(UTC)
    subscriptions = (
        await session.scalars(
            select(Subscription).where(
                Subscription.patient_id == appointment.patient_id,
                Subscription.starts_at <= now,
                Subscription.ends_at > now,
            )
        )
    ).all()
    assert patient.active
    assert doctor.active
    assert subscriptions
    of_party = (Session.patient_id == appointment.patient_id) | (Session.doctor_id == appointment.doctor_id)
    live = select(Session.id).where(of_party, Session.status.in_(("waiting", "connecting", "active")))
    assert (await session.scalars(live)).first() is None
    text = appointment.modality == "text"
    created = Session(
        tenant_id=appointment.tenant_id,
        kind="text" if text else "call",
        modality=appointment.modality,
        source="APPOINTMENT",
        appointment_id=appointment.id,
        patient_id=appointment.patient_id,
        doctor_id=appointment.doctor_id,
        status="waiting" if text else "connecting",
        expires_at=appointment.ends_at,
    )
    session.add(created)
    await session.flush()
    appointment.session_id, appointment.status = created.id, "IN_PROGRESS"
    tenant = {"tenant_id": appointment.tenant_id}
    conversation = Conversation(**tenant, appointment_id=appointment.id, session_id=created.id)
    event = Event(
        **tenant,
        name="session_started",
        aggregate=f"appointment:{appointment.id}",
        payload={"appointment_id": appointment.id, "session_id": created.id},
    )
    attempt = Attempt(
        **tenant,
        appointment_id=appointment.id,
        run_id=uuid4(),
        attempt=1,
        modality=appointment.modality,
        result="created",
        session_id=created.id,
    )
    session.add_all([conversation, event, attempt])
    await session.flush()
    people = ((appointment.patient_id, "patient"), (appointment.doctor_id, "doctor"))
    for user_id, role in people:
        session.add(Participant(**tenant, conversation_id=conversation.id, user_id=user_id, role=role))
    session.add(Delivery(event_id=event.id, consumer="notifications", lane="urgent", aggregate=event.aggregate))
