"""Alerts of the platform, whoever raises them: kept once each, however often and in whatever order they are told.

An alert has a fingerprint, by which its source knows it, and starts anew each time it fires. Sources run in pairs and
repeat themselves, so what they tell of one start is one row: it is resolved once anybody has said so, and whoever
still says that it fires is late.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, Literal

import orjson
from sqlalchemy import Row, select

from libs.domain.db import Database
from libs.domain.pages import Page, page_of
from libs.domain.tables import alerts
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction
from libs.observability.registry import Metrics

_log: Final = logger("alerts")

KEPT_FOR: Final = timedelta(days=90)
"""How long an alert is remembered once it is resolved, or nobody tells it any more."""

Status = Literal["firing", "resolved"]


class Severity(StrEnum):
    """From what can wait for the morning to what somebody is woken for."""

    INFO = "info"
    WARNING = "warning"
    HIGH = "high"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Told:
    """What a source says of an alert: that it fires since `started_at`, or did until `resolved_at`, which is no
    earlier. `value` and `threshold` are in the unit of `metric`. PostgreSQL stores no text with NUL in it."""

    fingerprint: str
    name: str
    severity: Severity
    component: str | None
    metric: str | None
    value: float | None
    threshold: float | None
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    started_at: datetime
    resolved_at: datetime | None

    @property
    def status(self) -> Status:
        return "firing" if self.resolved_at is None else "resolved"


@dataclass(frozen=True, slots=True)
class Alert(Told):
    """An alert as it is kept: in the words in which it was told first. `deliveries` is how often it was told."""

    id: int
    source: str
    last_seen_at: datetime
    deliveries: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which alerts to list: those that agree in all that is given."""

    status: Status | None = None
    severity: Severity | None = None
    component: str | None = None


EVERYTHING: Final = Wanted()

_KEEP: Final = """
    INSERT INTO alerts (source, fingerprint, name, severity, component, metric, value, threshold, labels, annotations,
        started_at, resolved_at, deliveries, resolutions)
    SELECT $1, told.*, 1, (resolved_at IS NOT NULL)::int
    FROM jsonb_to_recordset($2) AS told (fingerprint text, name text, severity text, component text, metric text,
        value float8, threshold float8, labels jsonb, annotations jsonb, started_at timestamptz,
        resolved_at timestamptz)
    ORDER BY fingerprint, started_at -- so that of two who tell the same, one waits for the other
    ON CONFLICT (source, fingerprint, started_at) DO UPDATE SET
        resolved_at = coalesce(alerts.resolved_at, excluded.resolved_at),
        last_seen_at = clock(),
        deliveries = alerts.deliveries + 1,
        resolutions = alerts.resolutions + excluded.resolutions
    RETURNING fingerprint, started_at, deliveries, resolutions
"""
_PRUNE: Final = """
    DELETE FROM alerts
    WHERE resolved_at < clock() - $1::interval OR (resolved_at IS NULL AND last_seen_at < clock() - $1::interval)
"""

_COLUMNS: Final = [alerts.c[name] for name in Alert.__dataclass_fields__]


async def keep(database: Database, metrics: Metrics, source: str, told: Iterable[Told]) -> None:
    """Keeps all that `source` says, or nothing. What is news is counted and logged, for whoever brings it first."""
    # What is told twice at once is over if it is once.
    once = {(each.fingerprint, each.started_at): each for each in sorted(told, key=lambda each: each.status)}
    if not once:
        return
    async with database.autocommit() as connection:
        kept = await connection.fetch(_KEEP, source, orjson.dumps(list(once.values())).decode())
    for row in kept:
        alert = once[row["fingerprint"], row["started_at"]]
        if row["resolutions" if alert.resolved_at else "deliveries"] == 1:
            metrics.counter("alerts_received_total", alert.severity, alert.status).inc()
            _tell(alert)


def _tell(alert: Told) -> None:
    if alert.resolved_at is None:
        _log.warning(
            "alert_received",
            alert=alert.name,
            severity=alert.severity,
            alert_component=alert.component,
            fingerprint=alert.fingerprint,
            started_at=alert.started_at,
        )
    else:
        _log.info(
            "alert_resolved",
            alert=alert.name,
            severity=alert.severity,
            alert_component=alert.component,
            fingerprint=alert.fingerprint,
            started_at=alert.started_at,
            resolved_at=alert.resolved_at,
        )


async def listed(tx: Transaction, wanted: Wanted = EVERYTHING, *, cursor: int | None = None, limit: int) -> Page[Alert]:
    """The alerts that are kept, the newest first."""
    statement = select(*_COLUMNS)
    if wanted.status is not None:
        resolved = alerts.c.resolved_at.is_not(None)
        statement = statement.where(resolved if wanted.status == "resolved" else ~resolved)
    if wanted.severity is not None:
        statement = statement.where(alerts.c.severity == wanted.severity)
    if wanted.component is not None:
        statement = statement.where(alerts.c.component == wanted.component)
    return await page_of(tx, statement, alerts.c.id, cursor, limit, _alert)


async def prune(database: Database) -> None:
    """Forgets what was resolved, or told for the last time, longer than `KEPT_FOR` ago."""
    async with database.autocommit() as connection:
        await connection.execute(_PRUNE, KEPT_FOR)


def _alert(row: Row[Any]) -> Alert:
    return Alert(**{**row._mapping, "severity": Severity(row.severity)})
