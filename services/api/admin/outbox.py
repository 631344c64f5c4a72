"""What could not be delivered to anybody of an operator's tenant, nor to its webhooks."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from libs.domain.outbox import dead
from libs.guardrails import Permission, Principal, Reason, Refused
from services.api.guards import Tx, acting, guarded_router
from services.api.schemas import DEFAULT_LIMIT, Cursor, IdPath, Limit, Out, PageOut, page_out, refusals

router = guarded_router("/admin/outbox", tag="operators")


class DeadDeliveryOut(Out):
    """`consumer` did not get the event: `notifications`, or a webhook such as `webhook:7`."""

    id: int
    event_id: UUID
    event_name: str
    consumer: str
    aggregate: str
    attempts: int
    last_error: str | None
    response_status: int | None
    occurred_at: datetime
    dead_at: datetime


@router.get("/dead", responses=refusals())
async def list_dead_deliveries(
    caller: Annotated[Principal, acting(Permission.SEE_OPERATIONS)],
    tx: Tx,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[DeadDeliveryOut]:
    """Deliveries that were given up after their last attempt."""
    page = await dead.listed(tx, caller.tenant_id, cursor=cursor, limit=limit)
    return page_out(page, DeadDeliveryOut.model_validate)


@router.post("/dead/{delivery_id}/replay", status_code=204, responses=refusals(Reason.NOT_FOUND))
async def replay_dead_delivery(
    delivery_id: IdPath, caller: Annotated[Principal, acting(Permission.REPLAY_DELIVERIES)], tx: Tx
) -> None:
    """Has one of them tried again, with as many attempts as at first."""
    if not await dead.replay(tx, caller.tenant_id, [delivery_id], actor_id=caller.user_id):
        raise Refused(Reason.NOT_FOUND)
