from typing import Annotated

from libs.domain.sessions import sessions
from libs.guardrails import Permission, Principal, Reason, SessionStatus
from libs.guardrails.operations import CompleteSession, ViewSession
from libs.observability.tracing import span
from services.api.guards import Can, Tx, acting, guarded_router
from services.api.schemas import DEFAULT_LIMIT, Cursor, Limit, PageOut, page_out, refusals
from services.api.sessions.schemas import BillingOut, EndedOut, EndSession, SessionOut

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


@router.post("/{context}/end", responses=_CONTEXT)
async def end_session(context: Can[CompleteSession], tx: Tx, body: EndSession | None = None) -> EndedOut:
    """Ends the session for both parties; repeating it changes nothing and says so."""
    with span("session.end"):
        session, already_ended = await sessions.end(tx, context, body.reason if body else None)
    billing = BillingOut(units_charged=session.units_charged, units_added=0, payouts=[])
    return EndedOut(session=SessionOut.model_validate(session), billing=billing, already_ended=already_ended)
