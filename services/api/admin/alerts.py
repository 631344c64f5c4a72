"""What is wrong with the platform, or was. It concerns the operators of all tenants alike, and names no tenant."""

from datetime import datetime
from typing import Annotated

from fastapi import Query

from libs.domain import alerts
from libs.domain.alerts import Severity, Status
from libs.guardrails import Permission, Principal
from services.api.guards import Tx, acting, guarded_router
from services.api.schemas import DEFAULT_LIMIT, Cursor, Limit, Out, PageOut, page_out, refusals

router = guarded_router("/admin/alerts", tag="operators")


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


@router.get("", responses=refusals())
async def list_alerts(
    caller: Annotated[Principal, acting(Permission.SEE_OPERATIONS)],
    tx: Tx,
    status: Annotated[Status | None, Query()] = None,
    severity: Annotated[Severity | None, Query()] = None,
    component: Annotated[str | None, Query(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)] = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[AlertOut]:
    """Alerts of the platform, which are the same for the operators of every tenant; resolved ones for 90 days."""
    page = await alerts.listed(tx, alerts.Wanted(status, severity, component), cursor=cursor, limit=limit)
    return page_out(page, AlertOut.model_validate)
