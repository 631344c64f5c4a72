"""The audit log: who did what to whom, written in the transaction of the deed and never rewritten."""

from typing import Any, Final

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from libs.domain.transaction import Transaction
from libs.guardrails import Principal
from libs.observability.context import correlation_id

_RECORD: Final = text(
    "INSERT INTO audit_log (tenant_id, actor_id, action, subject, details, correlation_id)"
    " VALUES (:tenant_id, :actor_id, :action, :subject, :details, :correlation_id)"
).bindparams(bindparam("details", type_=JSONB))


async def record(tx: Transaction, actor: Principal, action: str, subject: str, **details: Any) -> None:
    """`subject` names the row concerned, such as `user:7` or `text_session:12`."""
    await tx.execute(
        _RECORD,
        {
            "tenant_id": actor.tenant_id,
            "actor_id": actor.user_id,
            "action": action,
            "subject": subject,
            "details": details,
            "correlation_id": correlation_id(),
        },
    )
