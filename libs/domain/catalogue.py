"""Every metric of this product. Nothing else creates one; names and labels are a contract."""

from typing import Final

from libs.domain.alerts import Severity
from libs.domain.conversion.causes import FailureReason
from libs.domain.invariants import INVARIANTS
from libs.domain.jobs import JOBS
from libs.domain.legacy.commands import Command
from libs.domain.outbox.events import EventName
from libs.guardrails import OPERATIONS, Family, Flag, Reason
from libs.guardrails.operations import names_of
from libs.observability.catalogue import Label, counter, emitted_by, gauge, histogram

_MODALITIES: Final = ("text", "voice", "video")
_TASKS: Final = ("auto_start", "recovery", "legacy")
_BILLING_ENDPOINTS: Final = ("end_session", "process_payment", "process_deduction")
_DIRECTIONS: Final = ("sent", "received", "broadcast")
_MODULES: Final = (
    "telephony",
    "conversation",
    "scheduling",
    "catalog",
    "compliance",
    "billing",
    "reporting",
    "infra",
)

_chat_operation: Final = Label("operation", tuple(names_of(Family.CHAT)))
_command_name: Final = Label("command_name", tuple(Command))
_event_name: Final = Label("event_name", tuple(EventName))

# What `decide` can answer. A warning names what enforcement would have said.
_REFUSED: Final = (
    Reason.UNAUTHENTICATED,
    Reason.SESSION_CONTEXT_INVALID,
    Reason.SESSION_NOT_FOUND,
    Reason.APPOINTMENT_NOT_FOUND,
    Reason.ROLE_NOT_ALLOWED,
    Reason.SESSION_CONTEXT_REQUIRED,
    Reason.SESSION_BILLING_REQUIRED,
    Reason.SESSION_NOT_READY,
    Reason.SESSION_NOT_ACTIVE,
    Reason.SESSION_NOT_CONNECTED,
)
_WARNED: Final = (Reason.SESSION_CONTEXT_REQUIRED, Reason.SESSION_BILLING_REQUIRED, Reason.SESSION_NOT_READY)
_VERDICTS: Final = [
    ("allowed", "none"),
    *(("warned", reason.code) for reason in _WARNED),
    *(("refused", reason.code) for reason in _REFUSED),
]

_HTTP: Final = emitted_by(
    "api",
    histogram(
        "http_request_duration_seconds",
        "HTTP server request duration",
        Label("route", limit=80),
        Label("method", ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "OTHER")),
        Label("status", limit=30),
        source_alias="http_request_duration_ms",
    ),
    counter(
        "http_responses_total",
        "Answers to requests, those of probes apart",
        Label("class", ("1xx", "2xx", "3xx", "4xx", "5xx")),
    ),
    gauge("http_requests_in_flight", "HTTP requests being served"),
    counter(
        "errors_total",
        "Handled errors",
        Label("module", _MODULES),
        Label("type", ("authentication", "authorization", "validation", "system", "timeout")),
    ),
    counter(
        "auth_failures_total",
        "Authentication failures",
        Label("reason", ("bad_credentials", "expired", "invalid_token", "forbidden", "rate_limited")),
    ),
    counter(
        "security_events_total",
        "Refusals that may be attempts at more than is allowed",
        Label("kind", ("suspicious_ip", "privilege", "signature", "rate_limit", "other")),
    ),
)

_GUARD: Final = emitted_by(
    "api",
    counter(
        "guard_verdicts_total",
        "Verdicts of the session guard",
        Label("operation", tuple(OPERATIONS)),
        Label("verdict", ("allowed", "warned", "refused")),
        Label("reason", ("none", *(reason.code for reason in _REFUSED))),
        combinations=[(operation, *verdict) for operation in OPERATIONS for verdict in _VERDICTS],
    ),
    counter("legacy_identifier_total", "Requests that address a session in the old spelling"),
    counter("chat_requests_total", "Chat operations requested", _chat_operation),
    counter(
        "chat_blocked_session_context_required_total", "Chat operations blocked by the session guard", _chat_operation
    ),
    counter(
        "billing_blocked_session_context_required_total",
        "Billing calls blocked by the session guard",
        Label("endpoint", _BILLING_ENDPOINTS),
    ),
    counter(
        "guard_decisions_dropped_total",
        "Decisions that the decision log had no room for",
        Label("verdict", ("allowed", "warned", "refused")),
    ),
)

_FLAGS: Final = (
    gauge("feature_flag_enabled", "1 when the flag is on", Label("flag", tuple(Flag))),
    *emitted_by(
        "worker",
        counter("flag_tripwire_total", "Flags that went back to off by their tripwire", Label("flag", tuple(Flag))),
    ),
)

_SCHEDULING: Final = emitted_by(
    "api",
    histogram(
        "scheduling_book_duration_seconds", "Booking command duration", source_alias="scheduling_book_duration_ms"
    ),
    histogram(
        "booking_post_own_duration_seconds",
        "POST booking duration minus awaited third-party time",
        source_alias="booking_post_p95_ms",
        alias_expr="1000 * histogram_quantile(0.95, sum by (le) (rate(booking_post_own_duration_seconds_bucket[5m])))",
    ),
    counter("scheduling_book_conflict_total", "Booking conflicts"),
)

_CHAT: Final = emitted_by(
    "api",
    gauge("chat_connections_active", "Open websocket connections"),
    gauge("chat_active_users", "Users with a live connection"),
    counter("chat_connections_opened_total", "Websocket connections opened"),
    counter(
        "chat_connection_failures_total",
        "Failed connections or upgrades",
        Label("reason", ("auth", "upgrade", "timeout", "protocol", "other")),
    ),
    counter("chat_reconnections_total", "Clients that came back and said what they had"),
    counter(
        "chat_message_errors_total",
        "Frames of clients that were refused, and clients too slow to be served",
        Label("reason", ("validation", "blocked", "delivery", "timeout", "system", "rate_limited")),
    ),
    counter("chat_messages_total", "Messages handled", Label("direction", _DIRECTIONS)),
    counter("chat_message_retries_total", "Messages sent again under an id that was stored before"),
    histogram(
        "chat_message_processing_duration_seconds", "Message processing duration", Label("direction", _DIRECTIONS)
    ),
)

_LEGACY: Final = emitted_by(
    "worker",
    counter("legacy_trigger_executions_total", "Legacy trigger runs", _command_name),
    counter(
        "legacy_trigger_appointments_processed_total",
        "Appointments processed by legacy triggers",
        _command_name,
        Label("has_session", ("true", "false")),
    ),
)

_BILLING: Final = (
    histogram(
        "chat_session_duration_seconds",
        "Duration of ended sessions",
        Label("modality", _MODALITIES),
        buckets=(60, 300, 600, 900, 1200, 1800, 2700, 3600, 5400, 7200),
    ),
    histogram("chat_session_messages", "Messages per ended session", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500)),
    counter("billing_units_charged_total", "Units charged to patients", Label("modality", _MODALITIES)),
    counter("billing_payout_minor_total", "Paid to doctors, in the minor unit", Label("currency", limit=10)),
    histogram("settlement_duration_seconds", "Time to settle sessions, by one statement"),
)

_CONVERSION: Final = emitted_by(
    "worker",
    gauge("appointments_due_count", "Confirmed appointments that are due and have no session"),
    gauge("appointments_overdue", "Appointments that nothing has tried although they could be, for 30 seconds"),
    gauge("appointments_needs_attention", "Appointments whose conversion is parked until an operator acts"),
    counter("appointment_session_conversion_attempted_total", "Conversions begun", Label("task", _TASKS)),
    counter("appointment_sessions_created_total", "Committed conversions", Label("modality", _MODALITIES)),
    counter("appointment_session_conversion_failed_total", "Failed conversions", Label("reason", tuple(FailureReason))),
    counter(
        "appointment_session_conversion_skipped_total",
        "Appointments that had changed once they were locked, or that could not start before they were due",
    ),
    counter("appointment_session_notification_failed_total", "Notification failed after successful conversion"),
    histogram(
        "appointment_start_delay_seconds",
        "How long after an appointment was due, or could be tried again, its session was there",
        buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
    ),
    histogram("appointment_conversion_run_duration_seconds", "Conversion run duration", Label("task", _TASKS[:2])),
    gauge(
        "appointment_conversion_last_run_timestamp_seconds",
        "Unix time of the last finished run",
        Label("task", _TASKS[:2]),
    ),
)

_BACKGROUND: Final = emitted_by(
    "worker",
    counter("outbox_dispatch_attempts_total", "Outbox dispatch attempts", _event_name),
    counter("outbox_dispatch_failures_total", "Outbox dispatch failures", _event_name),
    gauge(
        "outbox_dispatch_lag_seconds",
        "How long what is due in the outbox has waited for a worker, what is for webhooks apart; what was replayed, or"
        " failed and is tried again, since its time came",
    ),
    gauge("outbox_dead", "Deliveries that were given up, those to webhooks apart"),
    counter(
        "webhook_deliveries_total",
        "Attempts to deliver an event to a webhook endpoint",
        Label("result", ("delivered", "rejected", "gone", "timeout", "unreachable", "forbidden")),
    ),
    histogram("webhook_delivery_duration_seconds", "Duration of an attempt to deliver to a webhook endpoint"),
    gauge("worker_queue_depth", "Pending items per queue", Label("queue", ("outbox", "arq"))),
    histogram(
        "job_duration_seconds",
        "Job duration",
        Label("task", tuple(JOBS)),
        Label("result", ("ok", "error", "retry", "timeout")),
    ),
    gauge(
        "audit_violations",
        "Rows that violate an invariant, as of the last audit",
        Label("invariant", tuple(invariant.name for invariant in INVARIANTS)),
    ),
    gauge("audit_last_run_timestamp_seconds", "Unix time of the last finished audit"),
    gauge("audit_interval_seconds", "How often there is to be an audit; 0 is never"),
    gauge(
        "gauges_last_run_timestamp_seconds",
        "Unix time at which the state of the database was last measured; where it cannot be, its gauges are NaN",
    ),
)

_ALERTS: Final = emitted_by(
    "api",
    counter(
        "alerts_received_total",
        "Alerts that began to fire or were resolved, each counted once however often it is told",
        Label("severity", tuple(Severity)),
        Label("status", ("firing", "resolved")),
    ),
)

_INFRASTRUCTURE: Final = (
    gauge("db_connections_in_use", "Pool connections checked out", Label("pool", ("api", "worker"))),
    gauge("db_connections_max", "Pool connections at most", Label("pool", ("api", "worker"))),
    counter(
        "db_pool_timeouts_total",
        "Times that somebody waited two seconds for a connection of a pool, and got none",
        Label("pool", ("api", "worker")),
    ),
    counter("doorbell_failures_total", "Wake-up calls that Redis did not take"),
    counter(
        "log_lines_not_stored_total",
        "Log lines that cannot be searched: more than are stored in a second, or the database took none",
        Label("level", ("routine", "urgent")),
    ),
)

ROOMS: Final = {
    "HTTP": _HTTP,
    "The guard": _GUARD,
    "Flags": _FLAGS,
    "Scheduling": _SCHEDULING,
    "Chat": _CHAT,
    "Billing": _BILLING,
    "Legacy commands": _LEGACY,
    "Conversion": _CONVERSION,
    "Background work": _BACKGROUND,
    "Alerts": _ALERTS,
    "Infrastructure": _INFRASTRUCTURE,
}

CATALOGUE: Final = tuple(spec for specs in ROOMS.values() for spec in specs)
