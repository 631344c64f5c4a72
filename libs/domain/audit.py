"""The audit log: who did what to whom, written in the transaction of the deed and never rewritten."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import bindparam, func, select, text
from sqlalchemy.dialects.postgresql import JSONB

from libs.domain.pages import Page, page_of
from libs.domain.tables import audit_log
from libs.domain.transaction import Transaction
from libs.guardrails import Principal
from libs.observability.context import correlation_id

_RECORD: Final = text(
    "INSERT INTO audit_log (tenant_id, actor_id, action, subject, details, correlation_id)"
    " VALUES (:tenant_id, :actor_id, :action, :subject, :details, :correlation_id)"
).bindparams(bindparam("details", type_=JSONB))


@dataclass(frozen=True, slots=True)
class Entry:
    """One deed; `actor_id` is None when it was the system's own, or done at the command line."""

    id: int
    at: datetime
    actor_id: int | None
    action: str
    subject: str
    details: dict[str, Any]
    correlation_id: str | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which entries to list: those that agree in all that is given. `since` is a moment, or how long ago it was."""

    actor_id: int | None = None
    action: str | None = None
    subject: str | None = None
    since: datetime | timedelta | None = None


EVERYTHING: Final = Wanted()

_COLUMNS: Final = [audit_log.c[name] for name in Entry.__dataclass_fields__]


async def record(tx: Transaction, actor: Principal, action: str, subject: str, **details: Any) -> None:
    """`subject` names the row concerned, such as `user:7` or `text_session:12`."""
    await write(tx, actor.tenant_id, actor.user_id, action, subject, details)


async def write(
    tx: Transaction, tenant_id: int | None, actor_id: int | None, action: str, subject: str, details: dict[str, Any]
) -> None:
    """Likewise for what concerns all tenants (`tenant_id` None), or was done by no user (`actor_id` None)."""
    await tx.execute(
        _RECORD,
        {
            "tenant_id": tenant_id,
            "actor_id": actor_id,
            "action": action,
            "subject": subject,
            "details": details,
            "correlation_id": correlation_id(),
        },
    )


async def listed(
    tx: Transaction, caller: Principal, wanted: Wanted = EVERYTHING, *, cursor: int | None, limit: int
) -> Page[Entry]:
    """What was done in the caller's tenant, newest first."""
    statement = select(*_COLUMNS).where(audit_log.c.tenant_id == caller.tenant_id)
    for name in ("actor_id", "action", "subject"):
        value = getattr(wanted, name)
        if value is not None:
            statement = statement.where(audit_log.c[name] == value)
    if isinstance(wanted.since, timedelta):
        statement = statement.where(audit_log.c.at >= func.clock() - wanted.since)
    elif wanted.since is not None:
        statement = statement.where(audit_log.c.at >= wanted.since)
    return await page_of(tx, statement, audit_log.c.id, cursor, limit, lambda row: Entry(**row._mapping))
