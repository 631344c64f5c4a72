"""Writing to the outbox: the event and one delivery per consumer, in the transaction of the fact."""

from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.expression import bindparam

from libs.domain.jobs import DispatchOutbox
from libs.domain.outbox.events import LANES, EventName, Lane, deliver
from libs.domain.transaction import Transaction
from libs.observability.context import carrier

_APPEND: Final = text(
    f"""
    WITH event AS (
        INSERT INTO outbox_events (tenant_id, name, aggregate, payload, correlation_id, trace_context)
        VALUES (:tenant_id, :name, :aggregate, :payload, :correlation_id, :trace_context)
        RETURNING id, aggregate
    )
    {deliver(":lane")}
    """
).bindparams(bindparam("payload", type_=JSONB), bindparam("trace_context", type_=JSONB))


async def append(tx: Transaction, name: EventName, *, tenant_id: int, aggregate: str, payload: dict[str, Any]) -> None:
    """Records that `name` happened to `aggregate` (such as `appointment:12`) and wakes the dispatcher.

    The trace context is stored here and now: a dispatcher drains many requests' rows, and its own
    ambient context would attribute them to the wrong one.
    """
    trace = carrier()
    await tx.execute(
        _APPEND,
        {
            "tenant_id": tenant_id,
            "name": name.value,
            "aggregate": aggregate,
            "payload": payload,
            "correlation_id": trace.get("correlation_id"),
            "trace_context": trace,
            "lane": LANES.get(name, Lane.NORMAL).value,
        },
    )
    tx.ring(DispatchOutbox())
