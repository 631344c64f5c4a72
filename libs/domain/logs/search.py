"""Stored lines of the log: searched, counted, and forgotten."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from libs.domain.db import Database
from libs.domain.tables import log_lines
from libs.observability.events import SEVERITY, Level

PRUNED_AT_ONCE: Final = 20_000
"""So many lines of a kind are forgotten by one statement, at most."""

Moment = datetime | timedelta
"""A moment, or how long ago it was."""

# Lines of one kind do not displace those of the other, however many there are. One process at a time is enough.
_PRUNE: Final = """
    WITH turn AS MATERIALIZED (SELECT pg_try_advisory_xact_lock(hashtextextended('log_lines', 0)) AS ours)
    DELETE FROM log_lines WHERE (SELECT ours FROM turn) AND id IN (
        (SELECT id FROM log_lines WHERE at < clock() - $1::interval ORDER BY at LIMIT $3)
        UNION ALL
        SELECT surplus.id FROM (VALUES (true), (false)) AS kind (urgent), LATERAL (
            SELECT id FROM log_lines WHERE urgent = kind.urgent ORDER BY id DESC OFFSET $2 LIMIT $3
        ) AS surplus
    )
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines: those that agree in all that is given. `level` stands for itself and all that is more severe."""

    since: Moment | None = None
    until: Moment | None = None
    level: Level | None = None
    component: str | None = None
    category: str | None = None
    event: str | None = None
    correlation_id: str | None = None
    user_id: int | None = None
    session_id: int | None = None
    tenant_id: int | None = None


@dataclass(frozen=True, slots=True)
class Count:
    """How many lines there are of an event at a level."""

    level: str
    event: str
    category: str | None
    lines: int


async def search(connection: AsyncConnection, wanted: Wanted, *, limit: int) -> list[str]:
    """The newest lines, at most `limit`, in the order in which they were written: JSON, as in the log."""
    statement = (
        select(log_lines.c.line).where(*_conditions(wanted)).order_by(log_lines.c.at.desc(), log_lines.c.id.desc())
    )
    return list((await connection.execute(statement.limit(limit))).scalars())[::-1]


async def count(connection: AsyncConnection, wanted: Wanted) -> list[Count]:
    """The lines by level and event, the most first."""
    kind = log_lines.c.level, log_lines.c.event, log_lines.c.category
    number = func.count().label("lines")
    statement = select(*kind, number).where(*_conditions(wanted)).group_by(*kind).order_by(number.desc(), *kind)
    return [Count(**row._mapping) for row in await connection.execute(statement)]


async def kept_since(connection: AsyncConnection) -> datetime | None:
    """When the oldest line was written; None when there is none."""
    oldest: datetime | None = (await connection.execute(select(func.min(log_lines.c.at)))).scalar_one()
    return oldest


def _conditions(wanted: Wanted) -> list[ColumnElement[bool]]:
    conditions = []
    if wanted.since is not None:
        conditions.append(log_lines.c.at >= _moment(wanted.since))
    if wanted.until is not None:
        conditions.append(log_lines.c.at < _moment(wanted.until))
    if wanted.level is not None:
        severe = [level for level, severity in SEVERITY.items() if severity >= SEVERITY[wanted.level]]
        conditions.append(log_lines.c.level.in_(severe))
    for name in ("component", "category", "event", "correlation_id", "user_id", "session_id", "tenant_id"):
        value = getattr(wanted, name)
        if value is not None:
            conditions.append(log_lines.c[name] == value)
    return conditions


def _moment(moment: Moment) -> Any:
    return func.clock() - moment if isinstance(moment, timedelta) else moment


async def prune(database: Database, *, hours: int, lines: int) -> None:
    """Forgets what is older than so many hours, and all but the newest so many lines of those below WARNING and of
    the others, one bounded statement after the other."""
    deleted = PRUNED_AT_ONCE
    while deleted >= PRUNED_AT_ONCE:
        async with database.autocommit() as connection:
            status = await connection.execute(_PRUNE, timedelta(hours=hours), lines, PRUNED_AT_ONCE)
        deleted = int(status.removeprefix("DELETE "))
