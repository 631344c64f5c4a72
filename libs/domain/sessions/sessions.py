"""Sessions as their participants see them, and how they end."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, literal_column, select

from libs.domain.pages import Page, page_of
from libs.domain.sessions.settlement import Ending, Settled, Settlement
from libs.domain.tables import BEGUN_AT, sessions
from libs.domain.transaction import Transaction
from libs.guardrails import Principal, Role, SessionContext, SessionKind, SessionRef, SessionStatus
from libs.guardrails.operations import CompleteSession, DeductInterval, ViewSession


@dataclass(frozen=True, slots=True)
class Session:
    """A session as stored; times are UTC. `response_deadline` is when a waiting text session expires
    unless the doctor answers, and is None until the patient's first message; of a call, when it is missed
    unless the other party answers, and None until somebody rings. `remaining_seconds` is how much of the allowance
    is left, None while none runs."""

    id: int
    tenant_id: int
    kind: SessionKind
    modality: str
    source: str
    status: SessionStatus
    appointment_id: int | None
    patient_id: int
    doctor_id: int
    created_at: datetime
    response_deadline: datetime | None
    activated_at: datetime | None
    connected_at: datetime | None
    ended_at: datetime | None
    end_reason: str | None
    units_charged: int
    warned_at: datetime | None
    remaining_seconds: int | None = field(compare=False)

    @property
    def context(self) -> str:
        return str(SessionRef(self.kind, self.id))


_REMAINING: Final = f"""
    CASE WHEN status = 'active' AND {BEGUN_AT} IS NOT NULL
        THEN greatest(0, ceil(extract(epoch FROM expires_at - clock())))::int END"""

_STORED: Final = [name for name in Session.__dataclass_fields__ if name != "remaining_seconds"]
COLUMNS: Final = f"{', '.join(f'sessions.{name}' for name in _STORED)}, {_REMAINING} AS remaining_seconds"
"""What a `Session` is made of, in SQL, of the table `sessions`."""

_COLUMNS: Final = [*(sessions.c[name] for name in _STORED), literal_column(_REMAINING).label("remaining_seconds")]


async def view(tx: Transaction, context: SessionContext[ViewSession]) -> Session:
    assert context.session is not None
    return await get(tx, context.session.id)


async def listed(
    tx: Transaction, caller: Principal, *, status: SessionStatus | None, cursor: int | None, limit: int
) -> Page[Session]:
    """The caller's sessions, newest first; an operator sees those of the tenant."""
    statement = select(*_COLUMNS).where(sessions.c.tenant_id == caller.tenant_id)
    match caller.role:
        case Role.PATIENT:
            statement = statement.where(sessions.c.patient_id == caller.user_id)
        case Role.DOCTOR:
            statement = statement.where(sessions.c.doctor_id == caller.user_id)
    if status is not None:
        statement = statement.where(sessions.c.status == status)
    return await page_of(tx, statement, sessions.c.id, cursor, limit, _session)


async def end(
    tx: Transaction, settlement: Settlement, context: SessionContext[CompleteSession], reason: str | None
) -> tuple[Session, Settled | None, bool]:
    """Ends the session, whose row the context holds locked; answers it, what that charged (None if nothing was left
    to settle), and whether it was over before.

    The appointment is completed and both parties become free in the same transaction. `ended_seq` is
    read under the lock, so no message can get a number after it.
    """
    facts = context.session
    assert facts is not None
    ending = Ending("end", context.caller.user_id, f"ended_by_{context.caller.role}", reason)
    settled = await settlement.one(tx, facts.id, ending)
    return await get(tx, facts.id), settled, facts.overdue or settled is None


async def charge(
    tx: Transaction, settlement: Settlement, context: SessionContext[DeductInterval]
) -> tuple[Session, Settled | None]:
    """Charges the whole units that have run; answers the session and what that added."""
    assert context.session is not None
    settled = await settlement.one(tx, context.session.id)
    return await get(tx, context.session.id), settled


async def get(tx: Transaction, session_id: int) -> Session:
    return _session((await tx.execute(select(*_COLUMNS).where(sessions.c.id == session_id))).one())


def _session(row: Row[Any]) -> Session:
    return session_of(row._mapping)


def session_of(row: Any) -> Session:
    """From a mapping that has the columns named as the fields."""
    fields = {name: row[name] for name in Session.__dataclass_fields__}
    return Session(**fields | {"kind": SessionKind(row["kind"]), "status": SessionStatus(row["status"])})
