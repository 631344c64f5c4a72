"""Letting appointments that wait for their next attempt try again, because what kept them is gone."""

from typing import Final

from sqlalchemy import text

from libs.domain.jobs import ConvertDue
from libs.domain.tables import BACKLOG
from libs.domain.transaction import Transaction

# Whether an appointment waits for its next attempt may not be visible yet: a conversion that is just failing
# holds its row. All that could be tried are taken, and waited for.
_UNBLOCK: Final = f"""
    UPDATE appointments SET next_attempt_at = clock()
    WHERE id IN (
        SELECT id FROM appointments
        WHERE {BACKLOG} AND id IN (SELECT appointment_id FROM appointment_parties WHERE user_id = ANY (:users))
        {{lock}}
    )
"""
_UNBLOCK_PARTIES: Final = text(_UNBLOCK.format(lock="FOR UPDATE"))
# A conversion that holds one of them may be waiting for the end of this very session.
UNBLOCK_AFTER_SESSION: Final = text(_UNBLOCK.format(lock="FOR UPDATE SKIP LOCKED"))


async def unblock(tx: Transaction, users: list[int], *, session_ended: bool = False) -> None:
    """Appointments of these people that wait for their next attempt may try again now. `session_ended` tells
    that this transaction also ends a session of theirs."""
    await tx.execute(UNBLOCK_AFTER_SESSION if session_ended else _UNBLOCK_PARTIES, {"users": users})
    tx.ring(ConvertDue())
