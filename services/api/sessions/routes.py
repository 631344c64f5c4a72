from typing import Annotated

from fastapi import Request

from libs.domain.sessions import direct, sessions
from libs.guardrails import Permission, Principal, Reason, SessionStatus
from libs.guardrails.operations import Answer, CompleteSession, Connect, Decline, Ring, ViewSession
from libs.observability.tracing import span
from services.api.guards import Can, Tx, acting, guarded_router, runtime_of
from services.api.schemas import DEFAULT_LIMIT, Cursor, Limit, PageOut, creating, page_out, refusals
from services.api.sessions.schemas import BillingOut, EndedOut, EndSession, PayoutOut, SessionOut, StartSession

router = guarded_router("/sessions", tag="sessions")

_CONTEXT = refusals(Reason.SESSION_CONTEXT_INVALID, Reason.SESSION_NOT_FOUND)
_CALL = refusals(
    Reason.SESSION_CONTEXT_INVALID, Reason.SESSION_NOT_FOUND, Reason.SESSION_NOT_ACTIVE, Reason.INVALID_TRANSITION
)


@router.post("", status_code=201, responses=creating(Reason.NO_SESSIONS_REMAINING, Reason.SESSION_CONFLICT))
async def start_session(
    caller: Annotated[Principal, acting(Permission.START_SESSIONS)], tx: Tx, new: StartSession
) -> SessionOut:
    """Starts a session at once, with a doctor who is free (patient)."""
    wanted = direct.NewSession(new.doctor_id, new.modality, new.reason)
    return SessionOut.model_validate(await direct.start(tx, caller, wanted))


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


@router.post("/{context}/ring", responses=_CALL)
async def ring_call(context: Can[Ring], request: Request, tx: Tx) -> SessionOut:
    """Calls the other party, who has until `response_deadline` to answer; ringing again gives no more time."""
    return SessionOut.model_validate(await runtime_of(request).calls.ring(tx, context))


@router.post("/{context}/answer", responses=_CALL)
async def answer_call(context: Can[Answer], request: Request, tx: Tx) -> SessionOut:
    """Takes the call of the other party; nobody can answer one's own ring."""
    return SessionOut.model_validate(await runtime_of(request).calls.answer(tx, context))


@router.post("/{context}/connected", responses=_CALL)
async def connect_call(context: Can[Connect], request: Request, tx: Tx) -> SessionOut:
    """Says that you are connected. The first time starts the units; say it again at least once a minute, because a
    call in which nobody does ends."""
    return SessionOut.model_validate(await runtime_of(request).calls.connect(tx, context))


@router.post("/{context}/decline", responses=_CALL)
async def decline_call(context: Can[Decline], request: Request, tx: Tx) -> SessionOut:
    """Refuses a call that has not been answered, or takes back one's own ring; either ends it."""
    return SessionOut.model_validate(await runtime_of(request).calls.decline(tx, context))


@router.post("/{context}/end", responses=creating(Reason.SESSION_CONTEXT_INVALID, Reason.SESSION_NOT_FOUND))
async def end_session(
    context: Can[CompleteSession], request: Request, tx: Tx, body: EndSession | None = None
) -> EndedOut:
    """Ends the session for both parties; repeating it changes nothing and says so."""
    reason = body.reason if body else None
    with span("session.end"):
        session, settled, already_ended = await sessions.end(tx, runtime_of(request).settlement, context, reason)
    return EndedOut(
        session=SessionOut.model_validate(session),
        billing=BillingOut(
            units_charged=session.units_charged,
            units_added=settled.units_added if settled else 0,
            payouts=[PayoutOut.model_validate(payout) for payout in settled.payouts] if settled else [],
        ),
        already_ended=already_ended,
    )
