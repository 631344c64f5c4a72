"""Appointments that do not become sessions."""

from typing import Final

from libs.domain.conversion.causes import WAITING
from libs.domain.conversion.monitor import Thresholds
from libs.observability.rules import Alert

# The same as those of `sessiongate appointments monitor-sessions`.
_LIMITS: Final = Thresholds()
_BACKLOG_LASTING: Final = f"{_LIMITS.backlog_window // 60}m"


def _failure_rate(limit: float, window: int) -> str:
    over = f"[{window // 60}m]"
    failed = "appointment_session_conversion_failed_total"
    return (
        f"sum(increase({failed}{over}))"
        f" / sum(increase(appointment_session_conversion_attempted_total{over})) > {limit}\n"
        f'and\nsum(increase({failed}{{reason!="{WAITING}"}}{over})) >= {_LIMITS.error_minimum}'
    )


CONVERSION: Final = (
    Alert(
        name="AppointmentsDueBacklog",
        expr=f"max(appointments_due_count) > {_LIMITS.backlog_warning}",
        lasting=_BACKLOG_LASTING,
        severity="warning",
        component="conversion",
        metric="appointments_due_count",
        summary="Appointments that are due wait for their session",
        description="{{ $value }} confirmed appointments are due and have no session.",
        runbook="docs/runbooks/backlog-grows.md",
    ),
    Alert(
        name="AppointmentsDueBacklogCritical",
        expr=f"max(appointments_due_count) > {_LIMITS.backlog_critical}",
        lasting=_BACKLOG_LASTING,
        severity="critical",
        component="conversion",
        metric="appointments_due_count",
        summary="Many appointments that are due wait for their session",
        description="{{ $value }} confirmed appointments are due and have no session.",
        runbook="docs/runbooks/backlog-grows.md",
        supersedes="AppointmentsDueBacklog",
    ),
    Alert(
        name="AppointmentConversionStalled",
        expr="max(appointments_overdue) > 0\n"
        "and\nsum(increase(appointment_session_conversion_attempted_total[5m])) == 0",
        lasting="5m",
        severity="critical",
        component="conversion",
        metric="appointments_overdue",
        summary="Appointments are due, and nothing is tried",
        description="Appointments that could be converted: {{ $value }}. None was tried within five minutes.",
        runbook="docs/runbooks/backlog-grows.md",
    ),
    Alert(
        name="AppointmentConversionJobMissing",
        expr='time() - (max(appointment_conversion_last_run_timestamp_seconds{task="auto_start"}) or vector(0)) > 300',
        lasting="2m",
        severity="critical",
        component="conversion",
        metric="appointment_conversion_last_run_timestamp_seconds",
        summary="Nothing converts appointments",
        description="No worker has looked for due appointments within five minutes.",
        runbook="docs/runbooks/backlog-grows.md",
    ),
    Alert(
        name="AppointmentConversionFailureRate",
        expr=_failure_rate(_LIMITS.error_warning, _LIMITS.error_warning_window),
        severity="warning",
        component="conversion",
        metric="appointment_session_conversion_failed_total",
        summary="Appointments fail to become sessions",
        description="{{ $value | humanizePercentage }} of conversions failed over ten minutes.",
        runbook="docs/runbooks/conversion-fails.md",
    ),
    Alert(
        name="AppointmentConversionFailureRateCritical",
        expr=_failure_rate(_LIMITS.error_critical, _LIMITS.error_critical_window),
        severity="critical",
        component="conversion",
        metric="appointment_session_conversion_failed_total",
        summary="Many appointments fail to become sessions",
        description="{{ $value | humanizePercentage }} of conversions failed over five minutes.",
        runbook="docs/runbooks/conversion-fails.md",
        supersedes="AppointmentConversionFailureRate",
    ),
    Alert(
        name="AppointmentsNeedAttention",
        expr="max(appointments_needs_attention) > 0",
        lasting="5m",
        severity="high",
        component="conversion",
        metric="appointments_needs_attention",
        summary="Appointments are parked, and nothing tries them any more",
        description="Appointments whose conversion has failed too often, and waits for an operator: {{ $value }}.",
        runbook="docs/runbooks/conversion-fails.md",
    ),
)
