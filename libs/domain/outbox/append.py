"""Writing to the outbox: the event and one delivery per consumer, in the transaction of the fact."""

from typing import Any, Final

from opentelemetry.trace import SpanKind
from sqlalchemy import TextClause, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.expression import bindparam

from libs.domain.jobs import DispatchOutbox
from libs.domain.outbox.events import LANES, EventName, Lane, deliver
from libs.domain.transaction import Transaction
from libs.observability.context import carrier
from libs.observability.tracing import span


def _with_event(statement: str) -> TextClause:
    return text(
        f"""
        WITH event AS (
            INSERT INTO outbox_events (tenant_id, name, aggregate, payload, correlation_id, trace_context)
            VALUES (:tenant_id, :name, :aggregate, :payload, :correlation_id, :trace_context)
            RETURNING id, tenant_id, name, aggregate
        )
        {statement}
        """
    ).bindparams(bindparam("payload", type_=JSONB), bindparam("trace_context", type_=JSONB))


_APPEND: Final = _with_event(deliver(":lane"))
_ADDRESS: Final = _with_event(
    """
    INSERT INTO outbox_deliveries (event_id, consumer, lane, aggregate)
    SELECT event.id, :consumer, :lane, event.aggregate FROM event
    RETURNING id
    """
)


async def append(tx: Transaction, name: EventName, *, tenant_id: int, aggregate: str, payload: dict[str, Any]) -> None:
    """Records that `name` happened to `aggregate` (such as `appointment:12`) and wakes the dispatcher.

    The trace context is stored here and now: a dispatcher drains many requests' rows, and its own
    ambient context would attribute them to the wrong one.
    """
    lane = LANES.get(name, Lane.NORMAL)
    with span("outbox.write", kind=SpanKind.PRODUCER, event_name=name.value):
        await tx.execute(_APPEND, _event(name, tenant_id, aggregate, payload) | {"lane": lane.value})
    tx.ring(DispatchOutbox())


async def address(
    tx: Transaction,
    consumer: str,
    lane: Lane,
    name: EventName,
    *,
    tenant_id: int,
    aggregate: str,
    payload: dict[str, Any],
) -> int:
    """Likewise, but for that consumer alone; answers the id of its delivery."""
    addressed = {"consumer": consumer, "lane": lane.value}
    with span("outbox.write", kind=SpanKind.PRODUCER, event_name=name.value):
        delivery = await tx.execute(_ADDRESS, _event(name, tenant_id, aggregate, payload) | addressed)
    tx.ring(DispatchOutbox())
    return int(delivery.scalar_one())


def _event(name: EventName, tenant_id: int, aggregate: str, payload: dict[str, Any]) -> dict[str, Any]:
    trace = carrier()
    return {
        "tenant_id": tenant_id,
        "name": name.value,
        "aggregate": aggregate,
        "payload": payload,
        "correlation_id": trace.get("correlation_id"),
        "trace_context": trace,
    }
