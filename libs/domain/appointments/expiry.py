"""Requests for an appointment that nobody confirmed in time."""

from typing import Final

from sqlalchemy import text

from libs.domain.jobs import DispatchOutbox
from libs.domain.outbox.events import EventName, Lane, deliver
from libs.domain.transaction import Transaction

EXPIRED_AT_ONCE: Final = 1000
"""At most so many are expired by one statement."""

_EXPIRE_PENDING: Final = text(
    f"""
    WITH expired AS (
        UPDATE appointments SET status = 'EXPIRED', updated_at = clock()
        WHERE id IN (
            SELECT id FROM appointments WHERE status = 'PENDING' AND starts_at <= clock()
            ORDER BY starts_at LIMIT :limit FOR UPDATE SKIP LOCKED
        )
        RETURNING id, tenant_id, patient_id, doctor_id
    ),
    event AS (
        INSERT INTO outbox_events (tenant_id, name, aggregate, payload)
        SELECT tenant_id, :name, 'appointment:' || id,
               jsonb_build_object('appointment_id', id, 'patient_id', patient_id, 'doctor_id', doctor_id)
        FROM expired
        RETURNING id, tenant_id, name, aggregate
    ),
    delivery AS ({deliver(":lane")})
    SELECT count(*) FROM expired
    """
)


async def expire_pending(tx: Transaction) -> int:
    """Requests for an appointment that nobody confirmed before they were due; answers how many."""
    parameters = {
        "limit": EXPIRED_AT_ONCE,
        "name": EventName.APPOINTMENT_EXPIRED.value,
        "lane": Lane.NORMAL.value,
    }
    expired: int = (await tx.execute(_EXPIRE_PENDING, parameters)).scalar_one()
    if expired:
        tx.ring(DispatchOutbox())
    return expired
