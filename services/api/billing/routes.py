"""What sessions cost: charged in between, looked up, and taken back."""

from typing import Annotated

from fastapi import Request

from libs.domain.billing import ledger
from libs.domain.sessions import sessions
from libs.guardrails import Permission, Principal, Reason, Role, parse_context
from libs.guardrails.operations import DeductInterval, ViewBilling
from services.api.billing.schemas import (
    BalanceOut,
    DeductedOut,
    LedgerOut,
    LineOut,
    RefundIn,
    RefundOut,
    UnitsOut,
    WalletOut,
)
from services.api.guards import Can, Tx, acting, guarded_router, runtime_of
from services.api.schemas import creating, refusals

sessions_router = guarded_router("/sessions", tag="billing", sessions_only=True)
balance_router = guarded_router("/billing", tag="billing")
operators_router = guarded_router("/admin", tag="operators")

_CONTEXT = (Reason.SESSION_CONTEXT_INVALID, Reason.SESSION_NOT_FOUND)


@sessions_router.post(
    "/{context}/deductions",
    responses=creating(*_CONTEXT, Reason.SESSION_NOT_ACTIVE, Reason.SESSION_NOT_CONNECTED),
)
async def deduct_interval(context: Can[DeductInterval], request: Request, tx: Tx) -> DeductedOut:
    """Charges the whole units that have run so far, as the worker does by itself once each is full."""
    session, settled = await sessions.charge(tx, runtime_of(request).settlement, context)
    return DeductedOut(units_charged=session.units_charged, units_added=settled.units_added if settled else 0)


@sessions_router.get("/{context}/billing", responses=refusals(*_CONTEXT))
async def get_session_billing(context: Can[ViewBilling], tx: Tx) -> LedgerOut:
    """The lines of the ledger that concern the session, oldest first."""
    assert context.session is not None
    lines = await ledger.lines(tx, context)
    return LedgerOut(
        session_context=str(context.session.ref),
        units_charged=sum(line.kind == "charge" for line in lines),
        units_refunded=sum(line.kind == "refund" for line in lines),
        items=[LineOut.model_validate(line) for line in lines],
    )


@balance_router.get("/balance", responses=refusals())
async def get_balance(caller: Annotated[Principal, acting(Permission.SEE_BALANCE)], tx: Tx) -> BalanceOut:
    """What you have: a patient's remaining units, or a doctor's earnings per currency."""
    if caller.role is Role.PATIENT:
        return BalanceOut(units=UnitsOut(**await ledger.units_left(tx, caller.user_id)), wallets=None)
    earned = await ledger.wallets(tx, caller.user_id)
    return BalanceOut(units=None, wallets=[WalletOut.model_validate(wallet) for wallet in earned])


@operators_router.post(
    "/refunds",
    status_code=201,
    responses=creating(*_CONTEXT, Reason.APPOINTMENT_NOT_FOUND, Reason.NOTHING_TO_REFUND),
)
async def create_refund(
    caller: Annotated[Principal, acting(Permission.REFUND_CHARGES)], tx: Tx, wanted: RefundIn
) -> RefundOut:
    """Takes back what was charged: the patient has the units again, and the doctor no longer the payout."""
    subject = parse_context(wanted.context)
    lines = await ledger.refund(tx, caller.tenant_id, caller, subject, unit=wanted.unit, reason=wanted.reason)
    return RefundOut(units_refunded=len(lines), items=[LineOut.model_validate(line) for line in lines])
