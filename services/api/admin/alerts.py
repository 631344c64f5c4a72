"""What is wrong with the platform, or was. It concerns the operators of all tenants alike, and names no tenant."""

from datetime import datetime
from typing import Annotated, TypeAlias

from fastapi import Depends, Query

from libs.domain import alerts
from libs.domain.alerts import Severity, Status, Wanted
from libs.guardrails import Permission, Principal
from services.api.guards import Tx, acting, guarded_router
from services.api.schemas import DEFAULT_LIMIT, Cursor, Limit, Out, PageOut, page_out, refusals

router = guarded_router("/admin", tag="operators")


class AlertOut(Out):
    """One time that an alert fired, in the words in which it was told first; `deliveries` is how often it was told."""

    id: int
    source: str
    fingerprint: str
    status: Status
    name: str
    severity: Severity
    component: str | None
    metric: str | None
    value: float | None
    threshold: float | None
    labels: dict[str, str]
    annotations: dict[str, str]
    started_at: datetime
    resolved_at: datetime | None
    last_seen_at: datetime
    deliveries: int


Caller: TypeAlias = Annotated[Principal, acting(Permission.SEE_OPERATIONS)]


def _wanted(
    status: Annotated[Status | None, Query()] = None,
    severity: Annotated[Severity | None, Query()] = None,
    component: Annotated[str | None, Query(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)] = None,
) -> Wanted:
    return Wanted(status, severity, component)


Filters: TypeAlias = Annotated[Wanted, Depends(_wanted)]


@router.get("/alerts", responses=refusals())
async def list_alerts(
    caller: Caller, tx: Tx, wanted: Filters, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT
) -> PageOut[AlertOut]:
    """Alerts of the platform, which are the same for the operators of every tenant; resolved ones for 90 days."""
    page = await alerts.listed(tx, wanted, cursor=cursor, limit=limit)
    return page_out(page, AlertOut.model_validate)


@router.get("/chat/alerts", responses=refusals(), deprecated=True)
async def list_chat_alerts(
    caller: Caller, tx: Tx, wanted: Filters, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT
) -> PageOut[AlertOut]:
    """The same, at the address that older clients know."""
    return await list_alerts(caller, tx, wanted, cursor, limit)
