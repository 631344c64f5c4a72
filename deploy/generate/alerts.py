"""When somebody has to look, room by room."""

from typing import Final

from deploy.generate.objectives import FAILED, REQUESTS
from libs.domain.conversion.monitor import Thresholds
from libs.observability.rules import Alert

# The same as those of `sessiongate appointments monitor-sessions`.
_LIMITS: Final = Thresholds()
_BACKLOG_LASTING: Final = f"{_LIMITS.backlog_window // 60}m"


def _failure_rate(window: int) -> str:
    return (
        f"sum(increase(appointment_session_conversion_failed_total[{window // 60}m]))"
        f" / sum(increase(appointment_session_conversion_attempted_total[{window // 60}m]))"
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
        expr="max(appointments_due_count) - max(appointments_due_count offset 5m) > 0\n"
        "and\nsum(increase(appointment_sessions_created_total[5m])) == 0",
        lasting="5m",
        severity="critical",
        component="conversion",
        metric="appointment_sessions_created_total",
        summary="No sessions are created while more and more are due",
        description="{{ $value }} more appointments are due than five minutes ago, and no session was created.",
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
        expr=f"{_failure_rate(_LIMITS.error_warning_window)} > {_LIMITS.error_warning}",
        severity="warning",
        component="conversion",
        metric="appointment_session_conversion_failed_total",
        summary="Appointments fail to become sessions",
        description="{{ $value | humanizePercentage }} of conversions failed over ten minutes.",
        runbook="docs/runbooks/conversion-fails.md",
    ),
    Alert(
        name="AppointmentConversionFailureRateCritical",
        expr=f"{_failure_rate(_LIMITS.error_critical_window)} > {_LIMITS.error_critical}",
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

GUARDRAILS: Final = (
    Alert(
        name="ChatBlockedRatio",
        expr="sum(increase(chat_blocked_session_context_required_total[10m]))"
        " / sum(increase(chat_requests_total[10m])) > 0.1",
        lasting="5m",
        severity="warning",
        component="guard",
        metric="chat_blocked_session_context_required_total",
        summary="Much of the chat is refused for want of a session's address",
        description="{{ $value | humanizePercentage }} of chat requests over ten minutes named an appointment that has"
        " a session.",
        runbook="docs/runbooks/blocked-requests.md",
    ),
    Alert(
        name="BillingBlocked",
        expr="sum by (endpoint) (increase(billing_blocked_session_context_required_total[10m])) > 0",
        severity="critical",
        component="guard",
        metric="billing_blocked_session_context_required_total",
        summary="Billing by appointment was refused",
        description="Calls of {{ $labels.endpoint }} were refused because the appointment has a session.",
        runbook="docs/runbooks/blocked-requests.md",
    ),
    Alert(
        name="FlagTripped",
        expr="sum by (flag) (increase(flag_tripwire_total[10m])) > 0",
        severity="high",
        component="flags",
        metric="flag_tripwire_total",
        summary="A rollout flag has turned itself off",
        description="{{ $labels.flag }} refused more than its tripwire allows, and is off.",
        runbook="docs/runbooks/rollout-and-rollback.md",
    ),
    Alert(
        name="LegacyTriggerProcessedSessionAppointment",
        expr="sum by (command_name)"
        ' (increase(legacy_trigger_appointments_processed_total{has_session="true"}[10m])) > 0',
        severity="critical",
        component="legacy",
        metric="legacy_trigger_appointments_processed_total",
        summary="A legacy command has processed an appointment that has a session",
        description="{{ $labels.command_name }} must leave appointments that have a session alone.",
        runbook="docs/runbooks/legacy-trigger.md",
    ),
    Alert(
        name="GuardDecisionsDropped",
        expr="sum by (verdict) (increase(guard_decisions_dropped_total[10m])) > 0",
        severity="warning",
        component="decisions",
        metric="guard_decisions_dropped_total",
        summary="The decision log has lost entries",
        description="Of decisions that were {{ $labels.verdict }}, some could not be written down.",
        runbook="docs/runbooks/lost-records.md",
    ),
)

REQUESTS_AND_CHAT: Final = (
    Alert(
        name="HighErrorRate",
        expr=f"sum(rate({FAILED}[5m])) / sum(rate({REQUESTS}[5m])) > 0.05",
        lasting="5m",
        severity="high",
        component="http",
        metric="http_request_duration_seconds",
        summary="Many requests fail",
        description="{{ $value | humanizePercentage }} of requests were answered with 5xx.",
        runbook="docs/runbooks/failing-requests.md",
    ),
    Alert(
        name="HighResponseTime",
        expr=f"histogram_quantile(0.95, sum by (le) (rate({REQUESTS.replace('_count', '_bucket')}[5m]))) > 2",
        lasting="5m",
        severity="warning",
        component="http",
        metric="http_request_duration_seconds",
        summary="Requests are answered slowly",
        description="One request in twenty takes longer than {{ $value | humanizeDuration }}.",
        runbook="docs/runbooks/slow-requests.md",
    ),
    Alert(
        name="EventLoopLag",
        expr="histogram_quantile(0.99, sum by (le, job, instance) (rate(asyncio_loop_lag_seconds_bucket[5m]))) > 0.25",
        lasting="5m",
        severity="warning",
        component="process",
        metric="asyncio_loop_lag_seconds",
        summary="A process is too busy to answer in time",
        description="The event loop of {{ $labels.instance }} lags by {{ $value | humanizeDuration }}.",
        runbook="docs/runbooks/slow-requests.md",
    ),
    Alert(
        name="AuthFailures",
        expr="60 * sum(rate(auth_failures_total[1m])) > 10",
        severity="warning",
        component="identity",
        metric="auth_failures_total",
        summary="Many tokens are refused",
        description='{{ $value | printf "%.0f" }} requests in a minute had no valid token.',
        runbook="docs/runbooks/refused-tokens.md",
    ),
    Alert(
        name="ChatConnectionSuccessLow",
        expr="sum(increase(chat_connections_opened_total[5m]))"
        " / (sum(increase(chat_connections_opened_total[5m])) + sum(increase(chat_connection_failures_total[5m])))"
        " < 0.95",
        lasting="5m",
        severity="warning",
        component="realtime",
        metric="chat_connection_failures_total",
        summary="Sockets fail to open",
        description="Only {{ $value | humanizePercentage }} of sockets were opened.",
        runbook="docs/runbooks/chat-connections.md",
    ),
)

DELIVERY: Final = (
    Alert(
        name="OutboxLag",
        expr="max(outbox_dispatch_lag_seconds) > 60",
        lasting="10m",
        severity="critical",
        component="outbox",
        metric="outbox_dispatch_lag_seconds",
        summary="Notifications are late",
        description="What is due in the outbox has waited for {{ $value | humanizeDuration }}.",
        runbook="docs/runbooks/outbox.md",
    ),
    Alert(
        name="OutboxDead",
        expr="max(outbox_dead) > 0",
        lasting="5m",
        severity="high",
        component="outbox",
        metric="outbox_dead",
        summary="Notifications were given up",
        description="Deliveries that have failed six times, and are not tried any more: {{ $value }}.",
        runbook="docs/runbooks/outbox.md",
    ),
    Alert(
        name="WebhookDeliveriesFailing",
        expr='sum(increase(webhook_deliveries_total{result=~"timeout|unreachable"}[15m])) > 10\n'
        'and\nsum(increase(webhook_deliveries_total{result!~"timeout|unreachable"}[15m])) == 0',
        severity="high",
        component="webhooks",
        metric="webhook_deliveries_total",
        summary="No webhook endpoint can be reached",
        description='All of {{ $value | printf "%.0f" }} attempts within a quarter of an hour met no receiver.',
        runbook="docs/runbooks/webhooks.md",
    ),
    Alert(
        name="WebhookDestinationForbidden",
        expr='sum(increase(webhook_deliveries_total{result="forbidden"}[15m])) > 0',
        severity="warning",
        component="webhooks",
        metric="webhook_deliveries_total",
        summary="A webhook endpoint leads into a network that is not public",
        description='Deliveries that were not made because of where they led: {{ $value | printf "%.0f" }}.',
        runbook="docs/runbooks/webhooks.md",
    ),
    Alert(
        name="DoorbellFailures",
        expr="sum by (job) (increase(doorbell_failures_total[5m])) > 0",
        lasting="5m",
        severity="warning",
        component="doorbell",
        metric="doorbell_failures_total",
        summary="Redis does not take wake-up calls",
        description="{{ $labels.job }} cannot ring: notifications may be a second late, messages to sockets two.",
        runbook="docs/runbooks/redis.md",
    ),
)

PLATFORM: Final = (
    Alert(
        name="TargetDown",
        expr="up == 0",
        lasting="2m",
        severity="critical",
        component="process",
        metric="up",
        summary="A process does not answer",
        description="{{ $labels.job }} at {{ $labels.instance }} tells no metrics.",
        runbook="docs/runbooks/target-down.md",
    ),
    Alert(
        name="ApiMissing",
        # Where targets are discovered, one that has gone is none that is down.
        expr='(count(build_info{service="sessiongate-api"}) or vector(0)) == 0',
        lasting="2m",
        severity="critical",
        component="process",
        metric="build_info",
        summary="There is no API",
        description="Prometheus knows of no API at all.",
        runbook="docs/runbooks/target-down.md",
    ),
    Alert(
        name="MemoryNearLimit",
        expr="process_resident_memory_bytes / process_memory_limit_bytes > 0.9",
        lasting="10m",
        severity="high",
        component="process",
        metric="process_resident_memory_bytes",
        summary="A process may be killed for want of memory",
        description="{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its memory.",
        runbook="docs/runbooks/target-down.md",
    ),
    Alert(
        name="DbSaturation",
        expr="db_connections_in_use / db_connections_max > 0.8",
        lasting="10m",
        severity="critical",
        component="database",
        metric="db_connections_in_use",
        summary="Database connections run out",
        description="{{ $value | humanizePercentage }} of the connections of {{ $labels.instance }} are in use.",
        runbook="docs/runbooks/database.md",
    ),
    Alert(
        name="AuditViolations",
        expr="max by (invariant) (audit_violations) > 0",
        severity="critical",
        component="audit",
        metric="audit_violations",
        summary="Rows violate what must always be true",
        description="Rows that violate {{ $labels.invariant }}: {{ $value }}.",
        runbook="docs/runbooks/audit.md",
    ),
    Alert(
        name="AuditNotRunning",
        expr="time() - max(audit_last_run_timestamp_seconds) > 3600",
        lasting="30m",
        severity="warning",
        component="audit",
        metric="audit_last_run_timestamp_seconds",
        summary="Nobody audits the database",
        description="The last audit ended more than an hour ago, or there was none.",
        runbook="docs/runbooks/audit.md",
    ),
    Alert(
        name="LogLinesDropped",
        expr="sum by (level, job) (increase(obs_log_lines_dropped_total[10m])) > 0",
        severity="warning",
        component="telemetry",
        metric="obs_log_lines_dropped_total",
        summary="Log lines are lost",
        description='Lines ({{ $labels.level }}) that {{ $labels.job }} has lost: {{ $value | printf "%.0f" }}.',
        runbook="docs/runbooks/lost-records.md",
    ),
    Alert(
        name="AlertDeliveryFailing",
        expr="sum by (integration) (increase(alertmanager_notifications_failed_total[10m])) > 0",
        # Both receivers are told: one of them is likely to be well.
        severity="critical",
        component="telemetry",
        metric="alertmanager_notifications_failed_total",
        summary="Alerts do not reach their receivers",
        description='Attempts to tell a {{ $labels.integration }} that have failed: {{ $value | printf "%.0f" }}.',
        runbook="docs/runbooks/alert-delivery.md",
    ),
)

ALERTS: Final = {
    "conversion": CONVERSION,
    "guardrails": GUARDRAILS,
    "requests-and-chat": REQUESTS_AND_CHAT,
    "delivery": DELIVERY,
    "platform": PLATFORM,
}
"""By the name of their group."""
