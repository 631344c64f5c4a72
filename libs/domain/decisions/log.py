"""The decision log as operators read it, and how long it is kept."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import select

from libs.domain.db import Database
from libs.domain.pages import Page, page_of
from libs.domain.tables import decisions
from libs.domain.transaction import Transaction
from libs.guardrails import Principal

KEPT_FOR: Final = timedelta(days=30)
PRUNED_AT_ONCE: Final = 10_000
"""At most so many decisions are forgotten by one statement."""

_PRUNE: Final = """
    WITH totals AS (DELETE FROM decision_totals WHERE minute < clock() - $1::interval)
    DELETE FROM decisions WHERE id IN (
        SELECT id FROM decisions WHERE at < clock() - $1::interval ORDER BY at LIMIT $2
    )
"""


@dataclass(frozen=True, slots=True)
class RecordedDecision:
    """One verdict as recorded; times are UTC. `reason` is the refusal, or what enforcement would have refused
    with; `flag` is the one it hung on, and `flags` are the values that all of them had."""

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


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which decisions to list; None stands for all."""

    operation: str | None = None
    verdict: str | None = None
    user_id: int | None = None
    appointment_id: int | None = None
    session_id: int | None = None


_COLUMNS: Final = [decisions.c[name] for name in RecordedDecision.__dataclass_fields__]


async def listed(
    tx: Transaction, caller: Principal, wanted: Wanted, *, cursor: int | None, limit: int
) -> Page[RecordedDecision]:
    """What was decided in the caller's tenant, newest first."""
    statement = select(*_COLUMNS).where(decisions.c.tenant_id == caller.tenant_id)
    for name in Wanted.__dataclass_fields__:
        value = getattr(wanted, name)
        if value is not None:
            statement = statement.where(decisions.c[name] == value)
    return await page_of(tx, statement, decisions.c.id, cursor, limit, lambda row: RecordedDecision(**row._mapping))


async def prune(database: Database) -> None:
    """Forgets what is older than `KEPT_FOR`, a bounded number of rows at a time."""
    async with database.autocommit() as connection:
        await connection.execute(_PRUNE, KEPT_FOR, PRUNED_AT_ONCE)
