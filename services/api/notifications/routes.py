from datetime import datetime
from typing import Annotated

from libs.domain import notifications
from libs.guardrails import Permission, Principal
from services.api.guards import Tx, acting, guarded_router
from services.api.schemas import DEFAULT_LIMIT, Cursor, Limit, Out, PageOut, page_out, refusals

router = guarded_router("/notifications", tag="notifications")


class NotificationOut(Out):
    id: int
    kind: str
    appointment_id: int | None
    session_context: str | None
    created_at: datetime
    read_at: datetime | None


@router.get("", responses=refusals())
async def list_notifications(
    caller: Annotated[Principal, acting(Permission.SEE_NOTIFICATIONS)],
    tx: Tx,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[NotificationOut]:
    """What was delivered to you, newest first."""
    page = await notifications.listed(tx, caller, cursor, limit)
    return page_out(page, NotificationOut.model_validate)
