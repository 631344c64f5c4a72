"""How conversion is doing, all from rows, so that every process gives the same answer.

A worker writes a sample of each tenant's backlog every 15 seconds; "for five minutes" is read from
those samples. Without a worker there are no samples, and then the age of the oldest due appointment
speaks for itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple

from libs.domain.conversion.causes import WAITING
from libs.domain.conversion.statement import DUE_AT
from libs.domain.db import Database
from libs.domain.tables import BACKLOG, DUE

Level = Literal["ok", "warning", "critical"]

SAMPLE_SECONDS: Final = 15
SAMPLES_KEPT: Final = "7 days"
PATIENCE_SECONDS: Final = 30
"""How long what could be tried may wait until it is overdue; a worker takes it within a second."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When to alert. Counts are appointments, rates are shares of 1, windows are seconds.

    `error_minimum` failures there must be in a window, those that only wait for somebody not counted, for their share
    to say something: a single appointment fails at most four times in ten minutes.
    """

    backlog_warning: int = 10
    backlog_critical: int = 50
    backlog_window: int = 300
    error_warning: float = 0.02
    error_warning_window: int = 600
    error_critical: float = 0.10
    error_critical_window: int = 300
    error_minimum: int = 5


@dataclass(frozen=True, slots=True)
class BacklogAlert:
    level: Level
    count: int


@dataclass(frozen=True, slots=True)
class ErrorRateAlert:
    """`rate` is failed / attempted in the window of the level, or in the longer one when it is ok."""

    level: Level
    rate: float
    attempted: int
    failed: int


@dataclass(frozen=True, slots=True)
class CreationAlert:
    """Critical when something could be tried all the time of the backlog's window, and nothing was."""

    level: Level


class Sample(NamedTuple):
    """The state of all tenants: how many are due, are due and were not tried when they could be, or are parked."""

    due: int
    overdue: int
    needs_attention: int


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of `monitor-sessions --json`."""

    appointments_due_count: int
    appointment_sessions_created_total: int
    appointment_session_conversion_failed_total: int
    created_last_minute: int
    failed_last_minute: int
    oldest_due_seconds: float
    needs_attention: int
    backlog_alert: BacklogAlert
    error_rate_alert: ErrorRateAlert
    creation_alert: CreationAlert

    @property
    def level(self) -> Level:
        """The worst of all alerts."""
        levels = (self.backlog_alert.level, self.error_rate_alert.level, self.creation_alert.level)
        return max(levels, key=("ok", "warning", "critical").index)

    def fields(self) -> dict[str, Any]:
        return asdict(self)


_NOW: Final = f"""
    SELECT count(*) AS due,
        coalesce(extract(epoch FROM clock() - min(starts_at)), 0)::float8 AS oldest,
        count(*) FILTER (WHERE {DUE_AT} < clock() - make_interval(secs => $2)) AS overdue,
        (SELECT count(*) FROM appointments WHERE parked_at IS NOT NULL AND status = 'CONFIRMED'
            AND ($1::bigint IS NULL OR tenant_id = $1)) AS parked
    FROM appointments
    WHERE {BACKLOG} AND ($1::bigint IS NULL OR tenant_id = $1)
"""

_ATTEMPTS: Final = f"""
    WITH attempts AS (
        SELECT result, result = 'failed' AND reason <> '{WAITING}' AS broken,
            extract(epoch FROM clock() - started_at) AS age
        FROM conversion_attempts WHERE $1::bigint IS NULL OR tenant_id = $1
    )
    SELECT count(*) FILTER (WHERE result = 'created') AS created,
        count(*) FILTER (WHERE result = 'failed') AS failed,
        count(*) FILTER (WHERE result = 'created' AND age < 60) AS created_minute,
        count(*) FILTER (WHERE result = 'failed' AND age < 60) AS failed_minute,
        count(*) FILTER (WHERE result <> 'skipped' AND age < $2) AS attempted_backlog,
        count(*) FILTER (WHERE result <> 'skipped' AND age < $3) AS attempted_warning,
        count(*) FILTER (WHERE result = 'failed' AND age < $3) AS failed_warning,
        count(*) FILTER (WHERE broken AND age < $3) AS broken_warning,
        count(*) FILTER (WHERE result <> 'skipped' AND age < $4) AS attempted_critical,
        count(*) FILTER (WHERE result = 'failed' AND age < $4) AS failed_critical,
        count(*) FILTER (WHERE broken AND age < $4) AS broken_critical
    FROM attempts
"""

# The due count of each sampled moment, oldest first; the window is covered when the first is old enough.
_SAMPLES: Final = """
    SELECT slot, sum(due_count)::bigint AS due, extract(epoch FROM clock() - slot)::float8 AS age
    FROM conversion_samples
    WHERE slot > clock() - make_interval(secs => $2) AND ($1::bigint IS NULL OR tenant_id = $1)
    GROUP BY slot ORDER BY slot
"""

_SAMPLE: Final = f"""
    WITH slot AS (SELECT date_bin('{SAMPLE_SECONDS} seconds', clock(), 'epoch') AS at),
    pruned AS (DELETE FROM conversion_samples WHERE slot < clock() - interval '{SAMPLES_KEPT}'),
    due AS (SELECT tenant_id, count(*) AS due FROM appointments WHERE {BACKLOG} GROUP BY 1),
    parked AS (
        SELECT tenant_id, count(*) AS parked FROM appointments
        WHERE parked_at IS NOT NULL AND status = 'CONFIRMED' GROUP BY 1),
    written AS (
        INSERT INTO conversion_samples (slot, tenant_id, due_count, needs_attention)
        SELECT slot.at, t.id, coalesce(due.due, 0), coalesce(parked.parked, 0)
        FROM slot CROSS JOIN tenants t
        LEFT JOIN due ON due.tenant_id = t.id LEFT JOIN parked ON parked.tenant_id = t.id
        ON CONFLICT DO NOTHING)
    SELECT (SELECT coalesce(sum(due), 0) FROM due)::bigint AS due,
           (SELECT count(*) FROM appointments
               WHERE {DUE} AND {DUE_AT} < clock() - interval '{PATIENCE_SECONDS} seconds') AS overdue,
           (SELECT coalesce(sum(parked), 0) FROM parked)::bigint AS needs_attention
"""


async def sample(database: Database) -> Sample:
    """Writes this slot's samples unless another worker has."""
    async with database.autocommit() as connection:
        row = await connection.fetchrow(_SAMPLE)
    assert row is not None
    return Sample(row["due"], row["overdue"], row["needs_attention"])


async def report(database: Database, thresholds: Thresholds, tenant_id: int | None = None) -> Report:
    """The state of conversion in one tenant, or in all."""
    limits = thresholds
    async with database.autocommit() as connection, connection.transaction(readonly=True):
        now = await connection.fetchrow(_NOW, tenant_id, float(limits.backlog_window))
        attempts = await connection.fetchrow(
            _ATTEMPTS,
            tenant_id,
            float(limits.backlog_window),
            float(limits.error_warning_window),
            float(limits.error_critical_window),
        )
        samples = await connection.fetch(_SAMPLES, tenant_id, float(limits.backlog_window + SAMPLE_SECONDS))
    assert now is not None
    assert attempts is not None
    return Report(
        appointments_due_count=now["due"],
        appointment_sessions_created_total=attempts["created"],
        appointment_session_conversion_failed_total=attempts["failed"],
        created_last_minute=attempts["created_minute"],
        failed_last_minute=attempts["failed_minute"],
        oldest_due_seconds=round(now["oldest"], 3),
        needs_attention=now["parked"],
        backlog_alert=_backlog(limits, now["due"], now["oldest"], samples),
        error_rate_alert=_error_rate(limits, attempts),
        creation_alert=_creation(now["overdue"], attempts["attempted_backlog"]),
    )


def _backlog(limits: Thresholds, due: int, oldest: float, samples: Sequence[Any]) -> BacklogAlert:
    if _covered(limits, samples):
        # It was over the threshold the whole time if it was at its lowest.
        lowest = min(due, *(row["due"] for row in samples))
    elif oldest >= limits.backlog_window:
        lowest = due
    else:
        lowest = 0
    level: Level = "ok"
    if lowest > limits.backlog_critical:
        level = "critical"
    elif lowest > limits.backlog_warning:
        level = "warning"
    return BacklogAlert(level, due)


def _covered(limits: Thresholds, samples: Sequence[Any]) -> bool:
    """Whether the samples reach back over the whole window."""
    return bool(samples) and samples[0]["age"] >= limits.backlog_window - SAMPLE_SECONDS


def _error_rate(limits: Thresholds, attempts: Any) -> ErrorRateAlert:
    def rate(window: str) -> float:
        return float(attempts[f"failed_{window}"] / max(1, attempts[f"attempted_{window}"]))

    def is_over(window: str, limit: float) -> bool:
        return rate(window) > limit and attempts[f"broken_{window}"] >= limits.error_minimum

    if is_over("critical", limits.error_critical):
        level: Level = "critical"
    elif is_over("warning", limits.error_warning):
        level = "warning"
    else:
        level = "ok"
    window = "critical" if level == "critical" else "warning"
    return ErrorRateAlert(level, round(rate(window), 4), attempts[f"attempted_{window}"], attempts[f"failed_{window}"])


def _creation(overdue: int, attempted: int) -> CreationAlert:
    return CreationAlert("critical" if overdue and not attempted else "ok")
