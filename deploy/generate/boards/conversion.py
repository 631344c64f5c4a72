"""Do sessions start on time, and if not, what is in the way?"""

from typing import Final

from grafana_foundation_sdk.models import units

from deploy.generate.boards.panels import Query, above, below, board, heatmap, latency, row, stat, timeseries
from deploy.generate.boards.promql import increase, largest, per_minute, quantile, rate, ratio
from libs.domain.conversion.monitor import Thresholds

_ATTEMPTED: Final = "appointment_session_conversion_attempted_total"
_CREATED: Final = "appointment_sessions_created_total"
_FAILED: Final = "appointment_session_conversion_failed_total"
_DELAY: Final = "appointment_start_delay_seconds"
_LIMITS: Final = Thresholds()
_BACKLOG: Final = above(_LIMITS.backlog_warning, _LIMITS.backlog_critical)
_FAILURES: Final = above(_LIMITS.error_warning, _LIMITS.error_critical)

BOARD: Final = board(
    "conversion",
    "conversion",
    "Whether confirmed appointments become sessions when they are due, and why some do not.",
    row(
        "Now",
        [
            stat(
                "Due without a session",
                "Appointments whose people wait for a session that should be there. Normal is 0.",
                largest("appointments_due_count"),
                unit=units.Short,
                limits=_BACKLOG,
            ),
            stat(
                "Since the last run",
                "Workers look for due appointments every second. When this grows, none of them is well.",
                "time() - " + largest('appointment_conversion_last_run_timestamp_seconds{task="auto_start"}'),
                unit=units.Seconds,
                limits=above(60, 300),
            ),
            stat(
                "Failures, 10 min",
                "The share of attempts that failed. Parties who are still in another session are no failure.",
                ratio(rate(_FAILED, over="10m"), rate(_ATTEMPTED, over="10m")),
                unit=units.PercentUnit,
                limits=_FAILURES,
                empty="no attempts",
            ),
            stat(
                "Created, 10 min",
                "Sessions that conversion has started.",
                increase(_CREATED, over="10m"),
                unit=units.Short,
            ),
            stat(
                "Parked",
                "Appointments that failed ten times. They wait for somebody to mend the cause and run a recovery.",
                largest("appointments_needs_attention"),
                unit=units.Short,
                limits=above(1),
            ),
            stat(
                "On time in the last hour",
                "The share of sessions that started within a second of their time. The objective is 99 %.",
                ratio(rate(f'{_DELAY}_bucket{{le="1.0"}}', over="1h"), rate(f"{_DELAY}_count", over="1h")),
                unit=units.PercentUnit,
                limits=below(0.99, 0.95),
                empty="no starts",
            ),
        ],
    ),
    row(
        "The backlog and what works it off",
        [
            timeseries(
                "Backlog",
                "Due without a session, parked, and overdue: those that nothing tries although it could. A backlog that"
                " falls after a disturbance mends itself; one that is overdue needs you.",
                Query(largest("appointments_due_count"), "due"),
                Query(largest("appointments_overdue"), "overdue"),
                Query(largest("appointments_needs_attention"), "parked"),
                unit=units.Short,
                limits=_BACKLOG,
            ),
            timeseries(
                "Attempts and sessions",
                "What conversion did each minute. Nothing created beside a backlog means that it stands still.",
                Query(per_minute(_ATTEMPTED), "attempted"),
                Query(per_minute(_CREATED), "created"),
                Query(per_minute(_FAILED), "failed"),
                Query(per_minute("appointment_session_conversion_skipped_total"), "skipped"),
                unit=units.CountsPerMinute,
            ),
        ],
        [
            timeseries(
                "Failures by reason",
                "One reason alone is mostly one cause: an import, an expired plan, a database that refuses.",
                Query(per_minute(_FAILED, "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Sessions by modality",
                "A modality that stops while the others go on points to its own units or rules.",
                Query(per_minute(_CREATED, "modality"), "{{modality}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Attempts by task",
                "Who converts: the regular run, a recovery that somebody started, or the legacy command.",
                Query(per_minute(_ATTEMPTED, "task"), "{{task}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
        ],
    ),
    row(
        "Punctuality",
        [
            heatmap(
                "Delay of starts",
                "From the time of the appointment until its session was there.",
                _DELAY,
                unit=units.Seconds,
            ),
            timeseries(
                "Delay of starts, percentiles",
                "The objective is a second for 99 %.",
                Query(quantile(0.5, _DELAY), "P50"),
                Query(quantile(0.99, _DELAY), "P99"),
                unit=units.Seconds,
                limits=above(1),
            ),
            latency(
                "Duration of runs, P95",
                "A run that takes longer than a minute delays whatever is due next.",
                "appointment_conversion_run_duration_seconds",
                "task",
            ),
        ],
    ),
    row(
        "What follows a start, and what was before sessions",
        [
            timeseries(
                "Notifications that failed after a start",
                "The session is there, but somebody has not been told yet; the outbox tries again.",
                Query(per_minute("appointment_session_notification_failed_total"), "failed"),
                unit=units.CountsPerMinute,
                limits=above(1),
            ),
            timeseries(
                "Appointments closed by legacy commands",
                "With a session there must be none: those belong to their session's end.",
                Query(
                    per_minute("legacy_trigger_appointments_processed_total", "has_session"), "session: {{has_session}}"
                ),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Runs of legacy commands",
                "One a minute each, until the flag turns them off.",
                Query(per_minute("legacy_trigger_executions_total", "command_name"), "{{command_name}}"),
                unit=units.CountsPerMinute,
            ),
        ],
    ),
)
