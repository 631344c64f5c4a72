"""What a webhook endpoint got, did not get, and is to get again."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, select, update

from libs.domain import audit
from libs.domain.jobs import DispatchOutbox
from libs.domain.outbox.append import address
from libs.domain.outbox.dead import ANEW
from libs.domain.outbox.events import EventName, Lane, webhook
from libs.domain.pages import Page, page_of
from libs.domain.tables import outbox_deliveries, outbox_events
from libs.domain.transaction import Transaction
from libs.domain.webhooks import endpoints
from libs.guardrails import Principal, Reason, Refused


class DeliveryStatus(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for one endpoint. `event_id` is what the receiver sees as `webhook-id`, the same on every attempt;
    `next_attempt_at` is None once it was delivered or given up."""

    id: int
    event_id: UUID
    type: str
    status: DeliveryStatus
    attempts: int
    response_status: int | None
    last_error: str | None
    occurred_at: datetime
    next_attempt_at: datetime | None
    delivered_at: datetime | None
    dead_at: datetime | None


_DELIVERIES: Final[Select[Any]] = select(
    outbox_deliveries.c.id,
    outbox_events.c.event_id,
    outbox_events.c.name,
    outbox_deliveries.c.attempts,
    outbox_deliveries.c.response_status,
    outbox_deliveries.c.last_error,
    outbox_events.c.occurred_at,
    outbox_deliveries.c.available_at,
    outbox_deliveries.c.dispatched_at,
    outbox_deliveries.c.dead_at,
).join(outbox_events, outbox_events.c.id == outbox_deliveries.c.event_id)

_IN_STATUS: Final[dict[DeliveryStatus, ColumnElement[bool]]] = {
    DeliveryStatus.PENDING: outbox_deliveries.c.dispatched_at.is_(None) & outbox_deliveries.c.dead_at.is_(None),
    DeliveryStatus.DELIVERED: outbox_deliveries.c.dispatched_at.is_not(None),
    DeliveryStatus.DEAD: outbox_deliveries.c.dead_at.is_not(None),
}


async def listed(
    tx: Transaction,
    caller: Principal,
    endpoint_id: int,
    status: DeliveryStatus | None,
    cursor: int | None,
    limit: int,
) -> Page[Delivery]:
    """The deliveries to an endpoint of the caller's tenant, newest first."""
    await endpoints.get(tx, caller, endpoint_id)
    statement = _DELIVERIES.where(*_to(endpoint_id))
    if status is not None:
        statement = statement.where(_IN_STATUS[status])
    return await page_of(tx, statement, outbox_deliveries.c.id, cursor, limit, _delivery)


async def redeliver(tx: Transaction, caller: Principal, endpoint_id: int, delivery_id: int) -> Delivery:
    """Has an event delivered again, whatever became of it, with all its attempts before it."""
    await endpoints.get(tx, caller, endpoint_id)
    statement = update(outbox_deliveries).where(*_to(endpoint_id), outbox_deliveries.c.id == delivery_id).values(ANEW)
    if not (await tx.execute(statement)).rowcount:
        raise Refused(Reason.NOT_FOUND)
    await audit.record(tx, caller, "webhook_redelivered", webhook(endpoint_id), delivery_id=delivery_id)
    tx.ring(DispatchOutbox())
    return await _get(tx, delivery_id)


async def ping(tx: Transaction, caller: Principal, endpoint_id: int) -> Delivery:
    """Sends an endpoint the event `ping`, to see whether it works."""
    await endpoints.get(tx, caller, endpoint_id)
    consumer = webhook(endpoint_id)
    delivery_id = await address(
        tx,
        consumer,
        Lane.WEBHOOKS,
        EventName.PING,
        tenant_id=caller.tenant_id,
        aggregate=consumer,
        payload={"endpoint_id": endpoint_id},
    )
    await audit.record(tx, caller, "webhook_tested", consumer, delivery_id=delivery_id)
    return await _get(tx, delivery_id)


def _to(endpoint_id: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return outbox_deliveries.c.consumer == webhook(endpoint_id), outbox_deliveries.c.lane == Lane.WEBHOOKS.value


async def _get(tx: Transaction, delivery_id: int) -> Delivery:
    return _delivery((await tx.execute(_DELIVERIES.where(outbox_deliveries.c.id == delivery_id))).one())


def _delivery(row: Row[Any]) -> Delivery:
    status = DeliveryStatus.PENDING
    if row.dispatched_at or row.dead_at:
        status = DeliveryStatus.DELIVERED if row.dispatched_at else DeliveryStatus.DEAD
    return Delivery(
        id=row.id,
        event_id=row.event_id,
        type=row.name,
        status=status,
        attempts=row.attempts,
        response_status=row.response_status,
        last_error=row.last_error,
        occurred_at=row.occurred_at,
        next_attempt_at=row.available_at if status is DeliveryStatus.PENDING else None,
        delivered_at=row.dispatched_at,
        dead_at=row.dead_at,
    )
