"""Deliveries that were given up, and giving them another chance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Row, func, select, update

from libs.domain import audit
from libs.domain.jobs import DispatchOutbox
from libs.domain.pages import Page, page_of
from libs.domain.tables import outbox_deliveries, outbox_events
from libs.domain.transaction import Transaction

ANEW: Final[dict[str, Any]] = {
    "dispatched_at": None,
    "dead_at": None,
    "attempts": 0,
    "available_at": func.clock(),
    # Whoever has it in hands may not finish it any more.
    "lease_until": None,
    "lease_token": None,
}
"""The columns of a delivery of which nothing was tried yet."""


@dataclass(frozen=True, slots=True)
class DeadDelivery:
    """`consumer` is who did not get the event, such as `webhook:7`; `aggregate` what the event is about."""

    id: int
    tenant_id: int
    event_id: UUID
    event_name: str
    consumer: str
    aggregate: str
    attempts: int
    last_error: str | None
    response_status: int | None
    occurred_at: datetime
    dead_at: datetime


_DEAD: Final = (
    select(
        outbox_deliveries.c.id,
        outbox_events.c.tenant_id,
        outbox_events.c.event_id,
        outbox_events.c.name.label("event_name"),
        outbox_deliveries.c.consumer,
        outbox_deliveries.c.aggregate,
        outbox_deliveries.c.attempts,
        outbox_deliveries.c.last_error,
        outbox_deliveries.c.response_status,
        outbox_events.c.occurred_at,
        outbox_deliveries.c.dead_at,
    )
    .join(outbox_events, outbox_events.c.id == outbox_deliveries.c.event_id)
    .where(outbox_deliveries.c.dead_at.is_not(None))
)


async def listed(
    tx: Transaction,
    tenant_id: int | None,
    consumer: str | None = None,
    *,
    cursor: int | None = None,
    limit: int,
) -> Page[DeadDelivery]:
    """What was given up, newest first: of one tenant or of all, of one consumer or of all."""
    statement = _DEAD.where(*_of(tenant_id, consumer))
    return await page_of(tx, statement, outbox_deliveries.c.id, cursor, limit, _dead)


async def replay(
    tx: Transaction,
    tenant_id: int | None,
    ids: Sequence[int] | None,
    *,
    consumer: str | None = None,
    actor_id: int | None = None,
) -> list[int]:
    """Has dead deliveries tried again from the first attempt on: those of `ids`, or all; of one tenant or of all, of
    one consumer or of all. Answers which, in order. `actor_id` is for the audit log, None at the command line."""
    statement = (
        update(outbox_deliveries)
        .where(outbox_deliveries.c.dead_at.is_not(None), outbox_events.c.id == outbox_deliveries.c.event_id)
        .where(*_of(tenant_id, consumer))
        .values(ANEW)
        .returning(outbox_deliveries.c.id, outbox_deliveries.c.consumer, outbox_events.c.tenant_id)
    )
    if ids is not None:
        statement = statement.where(outbox_deliveries.c.id.in_(ids))
    rows = sorted((await tx.execute(statement)).all(), key=lambda row: int(row.id))
    for row in rows:
        details = {"consumer": row.consumer}
        await audit.write(tx, row.tenant_id, actor_id, "delivery_replayed", f"delivery:{row.id}", details)
    tx.ring(DispatchOutbox())
    return [row.id for row in rows]


def _of(tenant_id: int | None, consumer: str | None) -> Iterator[ColumnElement[bool]]:
    if tenant_id is not None:
        yield outbox_events.c.tenant_id == tenant_id
    if consumer is not None:
        yield outbox_deliveries.c.consumer == consumer


def _dead(row: Row[Any]) -> DeadDelivery:
    return DeadDelivery(**row._mapping)
