"""In-app notifications: what the outbox delivered to each party, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, select

from libs.domain.db import Database
from libs.domain.outbox.dispatch import Event
from libs.domain.pages import Page, page_of
from libs.domain.tables import notifications, sessions
from libs.domain.transaction import Transaction
from libs.guardrails import Principal, SessionKind, SessionRef

# Delivered again after a crash, an event finds its rows there: by its own id, and for a session's start
# also by appointment and session.
_NOTIFY: Final = """
    INSERT INTO notifications (tenant_id, user_id, kind, appointment_id, session_id, event_id)
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[], $5::bigint[], $6::uuid[])
    ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, slots=True)
class Notification:
    id: int
    kind: str
    appointment_id: int | None
    session_context: str | None
    created_at: datetime
    read_at: datetime | None


class Notifications:
    """The consumer that tells both parties."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def deliver(self, events: Sequence[Event]) -> None:
        rows = [
            (
                event.tenant_id,
                event.payload[party],
                event.name.value,
                event.payload.get("appointment_id"),
                event.payload.get("session_id"),
                event.event_id,
            )
            for event in events
            for party in ("patient_id", "doctor_id")
        ]
        async with self._database.autocommit() as connection:
            await connection.execute(_NOTIFY, *zip(*rows, strict=True))


async def listed(tx: Transaction, caller: Principal, cursor: int | None, limit: int) -> Page[Notification]:
    """The caller's notifications, newest first."""
    statement = (
        select(
            notifications.c.id,
            notifications.c.kind,
            notifications.c.appointment_id,
            notifications.c.session_id,
            sessions.c.kind.label("session_kind"),
            notifications.c.created_at,
            notifications.c.read_at,
        )
        .outerjoin(sessions, sessions.c.id == notifications.c.session_id)
        .where(notifications.c.tenant_id == caller.tenant_id, notifications.c.user_id == caller.user_id)
    )
    return await page_of(tx, statement, notifications.c.id, cursor, limit, _notification)


def _notification(row: Row[Any]) -> Notification:
    context = str(SessionRef(SessionKind(row.session_kind), row.session_id)) if row.session_id else None
    return Notification(row.id, row.kind, row.appointment_id, context, row.created_at, row.read_at)
