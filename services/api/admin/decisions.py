"""What was decided and done in an operator's tenant, and what enforcing the flags would mean for it."""

from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import Query, Request
from pydantic import AfterValidator, BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from libs.domain import audit
from libs.domain.decisions import log, rollout
from libs.guardrails import OPERATIONS, Flag, Permission, Principal
from libs.guardrails.context import MAX_ID
from services.api.guards import Tx, acting, guarded_router, runtime_of
from services.api.schemas import DEFAULT_LIMIT, Cursor, Digits, Limit, Out, PageOut, page_out, refusals

router = guarded_router("/admin", tag="operators")

Observer = Annotated[Principal, acting(Permission.SEE_OPERATIONS)]


def _since(value: Any) -> Any:
    try:
        return rollout.since_of(value) if isinstance(value, str) else value
    except ValueError:
        raise PydanticCustomError(
            "since", "Must be a span such as 90m, 24h or 7d, or an RFC 3339 timestamp with an offset."
        ) from None


def _known(name: str) -> str:
    if name not in OPERATIONS:
        raise PydanticCustomError("operation", "Must be the name of an operation of the guard.")
    return name


_SINCE_SCHEMA: Final = {"type": "string", "default": "24h", "examples": ["24h", "2030-01-01T00:00:00Z"]}
Since = Annotated[
    timedelta | datetime,
    BeforeValidator(_since),
    WithJsonSchema(_SINCE_SCHEMA),
    Query(description="A span such as `90m`, `24h` or `7d`, or an RFC 3339 timestamp."),
]
Beginning = Annotated[
    timedelta | datetime | None,
    BeforeValidator(_since),
    WithJsonSchema({"type": "string", "examples": _SINCE_SCHEMA["examples"]}),
    Query(description="A span such as `90m`, `24h` or `7d`, or an RFC 3339 timestamp."),
]
OperationName = Annotated[str, AfterValidator(_known)]
Action = Annotated[str | None, Query(pattern=r"^[a-z]+(_[a-z]+)+$", max_length=100, examples=["user_created"])]
Subject = Annotated[str | None, Query(pattern=r"^[a-z_]{1,40}:[A-Za-z0-9_]{1,60}$", examples=["user:7"])]
IdQuery = Annotated[int | None, Query(ge=1, le=MAX_ID), Digits]


class CallersOut(Out):
    operation: str
    client: str
    would_be_refused: int
    refused: int
    users: int
    first_seen: datetime
    last_seen: datetime


class FlagReportOut(Out):
    """`callers` are those who ask most. A flag with `enforced_when: false` is enforced by turning it off."""

    flag: Flag
    enforced_when: bool
    requests: int
    would_be_refused: int
    refused: int
    users: int
    first_seen: datetime | None
    last_seen: datetime | None
    safe_to_enforce: bool
    why: str
    callers: list[CallersOut]


class RolloutOut(Out):
    since: datetime
    flags: list[FlagReportOut]


class DecisionOut(Out):
    id: int
    at: datetime
    operation: str
    identifier: str
    appointment_id: int | None
    session_id: int | None
    user_id: int
    role: str
    client: str
    verdict: str
    reason: str | None
    flag: str | None
    flags: dict[str, bool]
    correlation_id: str | None


class AuditEntryOut(Out):
    id: int
    at: datetime
    actor_id: int | None
    action: str
    subject: str
    details: dict[str, Any]
    correlation_id: str | None


@router.get("/rollout", responses=refusals())
async def get_rollout(caller: Observer, request: Request, since: Since = rollout.DEFAULT_SINCE) -> RolloutOut:
    """Whom each rollout flag refuses in your tenant, or would refuse, and whether it is safe to enforce."""
    report = await rollout.report(runtime_of(request).database, since, caller.tenant_id)
    return RolloutOut.model_validate(report)


@router.get("/decisions", responses=refusals())
async def list_decisions(
    caller: Observer,
    tx: Tx,
    operation: OperationName | None = None,
    verdict: Literal["allowed", "warned", "refused"] | None = None,
    user_id: IdQuery = None,
    appointment_id: IdQuery = None,
    session_id: IdQuery = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[DecisionOut]:
    """What the guard decided in the last 30 days: all refusals and warnings, and a sample of what was allowed."""
    wanted = log.Wanted(operation, verdict, user_id, appointment_id, session_id)
    page = await log.listed(tx, caller, wanted, cursor=cursor, limit=limit)
    return page_out(page, DecisionOut.model_validate)


@router.get("/audit-log", responses=refusals())
async def list_audit_log(
    caller: Observer,
    tx: Tx,
    actor_id: IdQuery = None,
    action: Action = None,
    subject: Subject = None,
    since: Beginning = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[AuditEntryOut]:
    """What was done in your tenant by those who may do more than others. `subject` names what was concerned, such as
    `user:7`."""
    wanted = audit.Wanted(actor_id, action, subject, since)
    page = await audit.listed(tx, caller, wanted, cursor=cursor, limit=limit)
    return page_out(page, AuditEntryOut.model_validate)
