from typing import Annotated

from fastapi import Request

from libs.domain.sessions import sessions
from libs.guardrails import Permission, Principal, Reason, SessionStatus
from libs.guardrails.operations import CompleteSession, ViewSession
from libs.observability.tracing import span
from services.api.guards import Can, Tx, acting, guarded_router, runtime_of
from services.api.schemas import DEFAULT_LIMIT, Cursor, Limit, PageOut, creating, page_out, refusals
from services.api.sessions.schemas import BillingOut, EndedOut, EndSession, PayoutOut, SessionOut

router = guarded_router("/sessions", tag="sessions")

_CONTEXT = refusals(Reason.SESSION_CONTEXT_INVALID, Reason.SESSION_NOT_FOUND)


@router.get("", responses=refusals())
async def list_sessions(
    caller: Annotated[Principal, acting(Permission.SEE_SESSIONS)],
    tx: Tx,
    status: SessionStatus | None = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> PageOut[SessionOut]:
    """Your sessions, newest first; operators see those of the tenant."""
    page = await sessions.listed(tx, caller, status=status, cursor=cursor, limit=limit)
    return page_out(page, SessionOut.model_validate)


@router.get("/{context}", responses=_CONTEXT)
async def get_session(context: Can[ViewSession], tx: Tx) -> SessionOut:
    return SessionOut.model_validate(await sessions.view(tx, context))


@router.post("/{context}/end", responses=creating(Reason.SESSION_CONTEXT_INVALID, Reason.SESSION_NOT_FOUND))
async def end_session(
    context: Can[CompleteSession], request: Request, tx: Tx, body: EndSession | None = None
) -> EndedOut:
    """Ends the session for both parties; repeating it changes nothing and says so."""
    reason = body.reason if body else None
    with span("session.end"):
        session, settled = await sessions.end(tx, runtime_of(request).settlement, context, reason)
    return EndedOut(
        session=SessionOut.model_validate(session),
        billing=BillingOut(
            units_charged=session.units_charged,
            units_added=settled.units_added if settled else 0,
            payouts=[PayoutOut.model_validate(payout) for payout in settled.payouts] if settled else [],
        ),
        already_ended=settled is None,
    )
