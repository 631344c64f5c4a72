"""How the rollout is doing: whom each flag refuses, or would refuse if it were enforced.

A request counts for a flag when its verdict hung on it. `ALLOW_LEGACY_APPOINTMENT_CHAT` allows where the
others forbid, so it is enforced by turning it off; everything below holds for it likewise.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from libs.domain.db import Database
from libs.guardrails import ENFORCES, Family, Flag
from libs.guardrails.operations import names_of

DEFAULT_SINCE: Final = timedelta(hours=24)
CALLERS_SHOWN: Final = 100
"""Per flag; those that ask most."""

_CONCERNS: Final = {**ENFORCES, Flag.ALLOW_LEGACY_APPOINTMENT_CHAT: Family.CHAT}
"""Whose traffic tells whether a flag can be enforced. The legacy commands have no traffic: people run them."""

_REPORT: Final = f"""
    WITH period AS (SELECT coalesce($1::timestamptz, clock() - $2::interval) AS since),
    by_user AS (
        -- Once over the rows; all that follows is over few.
        SELECT flag, operation, client, user_id, count(*) FILTER (WHERE verdict = 'warned') AS would_be_refused,
            count(*) FILTER (WHERE verdict = 'refused') AS refused, min(at) AS first_seen, max(at) AS last_seen
        FROM decisions
        WHERE at >= (SELECT since FROM period) AND flag IS NOT NULL AND verdict <> 'allowed'
          AND ($3::bigint IS NULL OR tenant_id = $3)
        GROUP BY 1, 2, 3, 4
    ),
    seen AS (
        SELECT flag, operation, client, sum(would_be_refused)::bigint AS would_be_refused,
            sum(refused)::bigint AS refused, count(DISTINCT user_id) AS users,
            min(first_seen) AS first_seen, max(last_seen) AS last_seen,
            row_number() OVER (PARTITION BY flag, operation IS NULL
                ORDER BY sum(would_be_refused + refused) DESC, operation, client) AS place
        FROM by_user GROUP BY GROUPING SETS ((flag), (flag, operation, client))
    ),
    traffic AS (
        SELECT concerned.flag, sum(total.requests)::bigint AS requests
        FROM unnest($4::text[], $5::text[]) AS concerned (flag, operation) JOIN decision_totals total USING (operation)
        WHERE total.minute > (SELECT since FROM period) - interval '1 minute'
          AND ($3::bigint IS NULL OR total.tenant_id = $3)
        GROUP BY 1
    )
    SELECT (SELECT since FROM period) AS since, flag, coalesce(traffic.requests, 0) AS requests,
        operation, client, coalesce(would_be_refused, 0) AS would_be_refused, coalesce(refused, 0) AS refused,
        coalesce(users, 0) AS users, first_seen, last_seen
    FROM unnest($6::text[]) WITH ORDINALITY AS known (flag, position)
    LEFT JOIN traffic USING (flag) LEFT JOIN seen USING (flag)
    WHERE place IS NULL OR place <= {CALLERS_SHOWN}
    ORDER BY position, operation IS NOT NULL, place
"""


@dataclass(frozen=True, slots=True)
class Callers:
    """Those who do one thing with one kind of client: how many requests would be or were refused, from how many
    users, and when (UTC)."""

    operation: str
    client: str
    would_be_refused: int
    refused: int
    users: int
    first_seen: datetime
    last_seen: datetime


@dataclass(frozen=True, slots=True)
class FlagReport:
    """`requests` are all of the operations that the flag concerns, whatever was decided. It is safe to enforce
    when there were some, and none that it refused or would have refused."""

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
    callers: list[Callers]


@dataclass(frozen=True, slots=True)
class Report:
    since: datetime
    flags: list[FlagReport]


_SPAN: Final = re.compile(r"([1-9][0-9]{0,4})([mhd])", re.ASCII)
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
_MOMENT: Final = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}.*", re.ASCII)


def since_of(text: str) -> timedelta | datetime:
    """Reads `90m`, `24h`, `7d`, or an RFC 3339 timestamp. Raises ValueError for everything else."""
    if span := _SPAN.fullmatch(text):
        return timedelta(**{_UNITS[span[2]]: int(span[1])})
    moment = datetime.fromisoformat(text) if _MOMENT.fullmatch(text) else None
    if moment is None or moment.tzinfo is None:
        raise ValueError("neither a span such as 24h nor a timestamp with an offset")
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("not a moment between the years 1 and 9999 in UTC") from error


async def report(database: Database, since: timedelta | datetime, tenant_id: int | None = None) -> Report:
    """The rollout since a moment, or for so long, in one tenant or in all."""
    moment, span = (None, since) if isinstance(since, timedelta) else (since, None)
    pairs = [(flag.value, name) for flag, family in _CONCERNS.items() for name in names_of(family)]
    concerned = [list(column) for column in zip(*pairs, strict=True)]
    async with database.autocommit() as connection:
        rows = await connection.fetch(_REPORT, moment, span, tenant_id, *concerned, [flag.value for flag in Flag])
    return Report(
        since=rows[0]["since"],
        flags=[
            # The first row of a flag is about all of its callers, the others about each.
            _flag_report(row, [_callers(each) for each in rows if each["flag"] == row["flag"] and each["operation"]])
            for row in rows
            if row["operation"] is None
        ],
    )


def _flag_report(row: Any, callers: list[Callers]) -> FlagReport:
    flag = Flag(row["flag"])
    safe, why = _judged(flag, row)
    return FlagReport(
        flag=flag,
        enforced_when=flag is not Flag.ALLOW_LEGACY_APPOINTMENT_CHAT,
        requests=row["requests"],
        would_be_refused=row["would_be_refused"],
        refused=row["refused"],
        users=row["users"],
        first_seen=row["first_seen"],
        last_seen=row["last_seen"],
        safe_to_enforce=safe,
        why=why,
        callers=callers,
    )


def _judged(flag: Flag, row: Any) -> tuple[bool, str]:
    affected = [
        f"{row[name]} {words}"
        for name, words in (("would_be_refused", "would have been refused"), ("refused", "were refused"))
        if row[name]
    ]
    if affected:
        return False, f"Of {row['requests']} requests {' and '.join(affected)}; users: {row['users']}."
    if flag not in _CONCERNS:
        return False, "No request depends on it: look for whoever still runs the legacy commands."
    if not row["requests"]:
        return False, f"No traffic seen: there were no {_CONCERNS[flag].value} requests."
    return True, f"Of {row['requests']} {_CONCERNS[flag].value} requests none would have been refused."


def _callers(row: Any) -> Callers:
    return Callers(**{name: row[name] for name in Callers.__dataclass_fields__})
