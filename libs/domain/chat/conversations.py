"""Finding the conversation that a sealed context is about."""

from typing import Final

from sqlalchemy import text

from libs.domain.transaction import Transaction
from libs.guardrails import Operation, SessionContext

_BY_APPOINTMENT: Final = text("SELECT id FROM conversations WHERE appointment_id = :appointment_id")
_ENTER: Final = text(
    """
    WITH conversation AS (
        INSERT INTO conversations (tenant_id, appointment_id) VALUES (:tenant_id, :appointment_id)
        ON CONFLICT (appointment_id) DO UPDATE SET appointment_id = excluded.appointment_id
        RETURNING id
    ), entered AS (
        INSERT INTO participants (tenant_id, conversation_id, user_id, role)
        SELECT :tenant_id, id, :user_id, :role FROM conversation
        ON CONFLICT (conversation_id, user_id) DO NOTHING
    )
    SELECT id FROM conversation
    """
)


async def find(tx: Transaction, context: SessionContext[Operation]) -> int | None:
    """The conversation's id; None while nobody has entered that of an appointment without a session."""
    if context.session is not None:
        return context.session.conversation_id
    assert context.appointment is not None
    found: int | None = (
        await tx.execute(_BY_APPOINTMENT, {"appointment_id": context.appointment.id})
    ).scalar_one_or_none()
    return found


async def enter(tx: Transaction, context: SessionContext[Operation]) -> int:
    """The conversation's id, with the caller as a participant; made for an appointment that has none yet."""
    if context.session is not None:
        return context.session.conversation_id
    assert context.appointment is not None
    parameters = {
        "tenant_id": context.caller.tenant_id,
        "appointment_id": context.appointment.id,
        "user_id": context.caller.user_id,
        "role": context.caller.role.value,
    }
    entered: int = (await tx.execute(_ENTER, parameters)).scalar_one()
    return entered
