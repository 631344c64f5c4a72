"""Every log event of this product. Nothing else is logged; names and fields are a contract."""

from typing import Final

from libs.observability.events import OWN, LogEvent, event

_VERDICT: Final = ("operation", "appointment_id", "session_id", "user_id", "enforced", "correlation_id", "tenant_id")
_SOCKET: Final = ("session_id", "user_id", "connection_id", "correlation_id", "tenant_id")
_RUN: Final = (
    *("run_id", "due_count", "attempted_count", "created_count", "skipped_count", "failed_count", "runtime_ms"),
    *("source", "dry_run"),
)

_GUARD: Final = (
    event("guard_blocked", "warning", "message", *_VERDICT),
    event("guard_allowed_with_warning", "warning", "message", *_VERDICT),
    event("guard_refused", "info", "error_code", *_VERDICT),
    event("decisions_not_written", "warning", "exception_type", "waiting", category="error"),
)

_CHAT: Final = (
    event(
        "chat_message_stored",
        "info",
        *("session_id", "user_id", "operation", "message_id", "duration_ms", "correlation_id", "tenant_id"),
        category="message",
    ),
    event("chat_connection_opened", "info", *_SOCKET, category="connection"),
    event("chat_connection_closed", "info", "code", "duration_ms", *_SOCKET, category="connection"),
    event("chat_connection_refused", "info", "error_code", "correlation_id", category="connection"),
    event("rooms_failed", "warning", "exception_type", category="error"),
    event("socket_slots_failed", "warning", "exception_type", category="error"),
    event("activity_not_written", "warning", "exception_type", "waiting", category="error"),
)

_SECURITY: Final = (
    event("auth_failed", "info", "reason", "client_ip", "correlation_id", category="security"),
    event("security_event", "info", "kind", "client_ip", "user_agent", "correlation_id", category="security"),
    event("jwks_reload_failed", "warning", "exception_type", category="security"),
)

_SESSIONS: Final = (
    event("session_state_changed", "info", "session_id", "status"),
    event("session_charged", "info", "session_id", "appointment_id", "units_added", "units_charged", "tenant_id"),
    event("charges_refunded", "info", "session_id", "appointment_id", "units", "tenant_id"),
    event("settlement_failed", "error", "exception_type", "session_id"),
)

_LEGACY: Final = (
    event("legacy_charged", "info", "appointment_id", "status", "units_added", "units_charged", "tenant_id"),
    event("legacy_triggers_disabled", "info", "message", "command_name", "disabled_tenants", "tenants"),
    event("legacy_trigger_run", "info", "command_name", "processed", "skipped", "job_run_id", "disabled_tenants"),
    event("legacy_trigger_failed", "error", "appointment_id", "exception_type"),
)

_CONVERSION: Final = (
    event(
        "appointment_session_conversion",
        "info",
        *("appointment_id", "result", "session_id", "failure_reason", "error_message", "modality", "delay_ms"),
        *("source", "job_run_id", "tenant_id", "correlation_id"),
    ),
    event("appointment_auto_start_run", "info", *_RUN),
    event("appointment_recovery_run", "info", *_RUN),
    event("pulse_beat_failed", "error", "exception_type"),
)

_OUTBOX: Final = (
    event("outbox_dispatched", "info", "event_name", "outbox_id", "attempts", "event_id", "consumer", "tenant_id"),
    event(
        "outbox_failed",
        "warning",
        *("event_name", "outbox_id", "attempts", "consumer", "tenant_id", "error_message", "exception_type", "dead"),
        category="error",
    ),
    event("outbox_lane_failed", "error", "exception_type"),
    event("webhook_disabled", "warning", "endpoint_id", "tenant_id", "reason"),
    event("doorbell_lost", "warning", "exception_type", category="error"),
)

_ALERT: Final = ("alert", "severity", "alert_component", "fingerprint", "started_at")

_ALERTS: Final = (
    event("alert_received", "warning", *_ALERT),
    event("alert_resolved", "info", *_ALERT, "resolved_at"),
    event("alerts_not_understood", "warning", "number", "kept", category="error"),
)

_FLAGS: Final = (
    event("flag_environment_shadowed", "warning", "flag", "tenant_id", "target", "environment"),
    event("flag_tripped", "error", "flag", "tenant_id", "requests", "refused"),
    event("flags_not_followed", "warning", "exception_type", category="error"),
)

_PROCESSES: Final = (
    event("worker_started", "info", "worker", "metrics_port"),
    event("worker_stopped", "info", "worker"),
    event("log_lines_not_stored", "warning", "exception_type", "waiting", category="error"),
    event("job_finished", "info", "task", "result", "duration_ms"),
    event("gauges_failed", "error", "exception_type", "task"),
    event("cron_failed", "error", "exception_type", "task"),
    event("audit_violation", "error", "invariant", "violations", "examples"),
    event("audit_failed", "error", "exception_type"),
    event("database_unavailable", "warning", "exception_type", category="error"),
    event("unhandled_error", "error", "error_code", "exception_type", "error_message", "stack_fingerprint"),
)

LOG_EVENTS: Final[dict[str, LogEvent]] = {
    each.name: each
    for each in (
        *(*OWN, *_GUARD, *_CHAT, *_SECURITY, *_SESSIONS, *_LEGACY),
        *(*_CONVERSION, *_OUTBOX, *_ALERTS, *_FLAGS, *_PROCESSES),
    )
}
"""By name, those of the telemetry library included."""
