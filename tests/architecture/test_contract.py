"""Names that clients, operators, dashboards and alerts rely on, written out: whoever renames one meets them here."""

import ast
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from libs.domain import log_events as registry
from libs.domain.catalogue import CATALOGUE
from libs.domain.conversion.report import Reporter
from libs.domain.outbox.append import append
from libs.domain.outbox.dispatch import Dispatcher, Event
from libs.domain.outbox.events import Consumer, EventName, Lane
from libs.domain.settings import FlagSettings
from libs.domain.transaction import transaction
from libs.guardrails import OPERATIONS, Flag, Reason
from libs.observability.catalogue import OWN
from libs.observability.events import EVERY_LINE, SEVERITY
from services.api.errors import STATUS
from services.api.realtime.frames import ClientFrame, ServerFrame
from tests.architecture.test_rules import ROOT, sources
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.log_lines import faults_of, lines_of
from tests.processes import until
from tests.running import Api
from tests.sockets import following, opened

REFUSALS = {
    "UNAUTHENTICATED": 401,
    "SESSION_CONTEXT_INVALID": 400,
    "SESSION_NOT_FOUND": 404,
    "APPOINTMENT_NOT_FOUND": 404,
    "MESSAGE_NOT_FOUND": 404,
    "ROLE_NOT_ALLOWED": 403,
    "ORIGIN_NOT_ALLOWED": 403,
    "SESSION_CONTEXT_REQUIRED": 400,
    "SESSION_NOT_READY": 403,
    "SESSION_BILLING_REQUIRED": 400,
    "SESSION_NOT_ACTIVE": 409,
    "SESSION_NOT_CONNECTED": 409,
    "SESSION_CONFLICT": 409,
    "NO_SESSIONS_REMAINING": 402,
    "NOTHING_TO_REFUND": 409,
    "SLOT_TAKEN": 409,
    "INVALID_TRANSITION": 409,
    "IDEMPOTENCY_CONFLICT": 409,
    "IDEMPOTENCY_KEY_REUSED": 422,
    "IDEMPOTENCY_IN_FLIGHT": 409,
    "VALIDATION_FAILED": 422,
    "NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "REQUEST_TIMEOUT": 408,
    "PAYLOAD_TOO_LARGE": 413,
    "RATE_LIMITED": 429,
    "OVERLOADED": 503,
    "INTERNAL_ERROR": 500,
}
NEXT_ACTIONS = {
    "SESSION_CONTEXT_REQUIRED": ("GET", "/api/v1/appointments/{appointment_id}/session"),
    "SESSION_NOT_READY": ("GET", "/api/v1/appointments/{appointment_id}/session"),
    "SESSION_BILLING_REQUIRED": ("POST", "/api/v1/sessions/{session_context}/end"),
}
FLAGS = {
    "ENFORCE_SESSION_GATED_CHAT",
    "ENFORCE_SESSION_GATED_BILLING",
    "DISABLE_LEGACY_APPOINTMENT_TRIGGERS",
    "ALLOW_LEGACY_APPOINTMENT_CHAT",
}
EVENTS = (
    "appointment_confirmed appointment_cancelled appointment_expired reschedule_proposed reschedule_accepted"
    " reschedule_rejected session_started session_ending_soon session_ended session_charged"
    " legacy_charged charges_refunded ping"
)
OPERATIONS_OF_SESSIONS = (
    "view_session complete_session deduct_interval view_billing ring answer connect decline"
    " end_session process_payment process_deduction"
)
MODULES = "telephony conversation scheduling catalog compliance billing reporting infra"
CHAT = (
    "send_message get_messages reply_to_message add_reaction remove_reaction start_typing stop_typing mark_as_read join"
)
INVARIANTS = (
    "one_session_per_appointment appointment_in_progress_has_session live_session_has_appointment_in_progress"
    " patient_in_one_live_session doctor_in_one_live_session doctor_not_double_booked appointment_holds_its_slot"
    " messages_numbered ended_session_has_last_number no_message_after_the_end ledger_sums_to_zero"
    " subscription_balances wallet_balances consumed_balances charged_session_has_begun units_counted"
    " units_within_allowance units_numbered no_unit_charged_twice legacy_bill_has_no_session unit_taken_once"
    " unit_paid_once refund_reverses_one_charge delivery_ends_once"
)
COMMANDS = "process_appointment_sessions activate_booked_appointments"
OPEN = None
"""A label whose values are not listed beforehand."""

METRICS: dict[str, tuple[str, dict[str, str | None]]] = {
    "http_request_duration_seconds": (
        "histogram",
        {"route": OPEN, "method": "GET POST PUT PATCH DELETE HEAD OPTIONS OTHER", "status": OPEN},
    ),
    "http_responses_total": ("counter", {"class": "1xx 2xx 3xx 4xx 5xx"}),
    "http_requests_in_flight": ("gauge", {}),
    "errors_total": (
        "counter",
        {"module": MODULES, "type": "authentication authorization validation system timeout"},
    ),
    "auth_failures_total": ("counter", {"reason": "bad_credentials expired invalid_token forbidden rate_limited"}),
    "security_events_total": ("counter", {"kind": "suspicious_ip privilege signature rate_limit other"}),
    "guard_verdicts_total": (
        "counter",
        {
            "operation": f"{CHAT} {OPERATIONS_OF_SESSIONS}",
            "verdict": "allowed warned refused",
            "reason": "none UNAUTHENTICATED SESSION_CONTEXT_INVALID SESSION_NOT_FOUND APPOINTMENT_NOT_FOUND"
            " ROLE_NOT_ALLOWED SESSION_CONTEXT_REQUIRED SESSION_BILLING_REQUIRED SESSION_NOT_READY SESSION_NOT_ACTIVE"
            " SESSION_NOT_CONNECTED",
        },
    ),
    "legacy_identifier_total": ("counter", {}),
    "chat_requests_total": ("counter", {"operation": CHAT}),
    "chat_blocked_session_context_required_total": ("counter", {"operation": CHAT}),
    "billing_blocked_session_context_required_total": (
        "counter",
        {"endpoint": "end_session process_payment process_deduction"},
    ),
    "guard_decisions_dropped_total": ("counter", {"verdict": "allowed warned refused"}),
    "feature_flag_enabled": ("gauge", {"flag": " ".join(FLAGS)}),
    "flag_tripwire_total": ("counter", {"flag": " ".join(FLAGS)}),
    "scheduling_book_duration_seconds": ("histogram", {}),
    "booking_post_own_duration_seconds": ("histogram", {}),
    "scheduling_book_conflict_total": ("counter", {}),
    "chat_connections_active": ("gauge", {}),
    "chat_active_users": ("gauge", {}),
    "chat_connections_opened_total": ("counter", {}),
    "chat_connection_failures_total": ("counter", {"reason": "auth upgrade timeout protocol other"}),
    "chat_reconnections_total": ("counter", {}),
    "chat_message_errors_total": (
        "counter",
        {"reason": "validation blocked delivery timeout system rate_limited"},
    ),
    "chat_messages_total": ("counter", {"direction": "sent received broadcast"}),
    "chat_message_retries_total": ("counter", {}),
    "chat_message_processing_duration_seconds": ("histogram", {"direction": "sent received broadcast"}),
    "chat_session_duration_seconds": ("histogram", {"modality": "text voice video"}),
    "chat_session_messages": ("histogram", {}),
    "billing_units_charged_total": ("counter", {"modality": "text voice video"}),
    "billing_payout_minor_total": ("counter", {"currency": OPEN}),
    "settlement_duration_seconds": ("histogram", {}),
    "legacy_trigger_executions_total": ("counter", {"command_name": COMMANDS}),
    "legacy_trigger_appointments_processed_total": (
        "counter",
        {"command_name": COMMANDS, "has_session": "true false"},
    ),
    "appointments_due_count": ("gauge", {}),
    "appointments_overdue": ("gauge", {}),
    "appointments_needs_attention": ("gauge", {}),
    "appointment_session_conversion_attempted_total": ("counter", {"task": "auto_start recovery legacy"}),
    "appointment_sessions_created_total": ("counter", {"modality": "text voice video"}),
    "appointment_session_conversion_failed_total": (
        "counter",
        {
            "reason": "invalid_appointment_state missing_doctor_or_patient createSession_validation_failed"
            " createSession_conflict_existing_session db_update_failed unknown_error"
        },
    ),
    "appointment_session_conversion_skipped_total": ("counter", {}),
    "appointment_session_notification_failed_total": ("counter", {}),
    "appointment_start_delay_seconds": ("histogram", {}),
    "appointment_conversion_run_duration_seconds": ("histogram", {"task": "auto_start recovery"}),
    "appointment_conversion_last_run_timestamp_seconds": ("gauge", {"task": "auto_start recovery"}),
    "outbox_dispatch_attempts_total": ("counter", {"event_name": EVENTS}),
    "outbox_dispatch_failures_total": ("counter", {"event_name": EVENTS}),
    "outbox_dispatch_lag_seconds": ("gauge", {}),
    "outbox_dead": ("gauge", {}),
    "webhook_deliveries_total": (
        "counter",
        {"result": "delivered rejected gone timeout unreachable forbidden"},
    ),
    "webhook_delivery_duration_seconds": ("histogram", {}),
    "worker_queue_depth": ("gauge", {"queue": "outbox arq"}),
    "db_connections_in_use": ("gauge", {"pool": "api worker"}),
    "db_connections_max": ("gauge", {"pool": "api worker"}),
    "db_pool_timeouts_total": ("counter", {"pool": "api worker"}),
    "job_duration_seconds": ("histogram", {"task": "convert_due dispatch_outbox", "result": "ok error retry timeout"}),
    "log_lines_not_stored_total": ("counter", {"level": "routine urgent"}),
    "doorbell_failures_total": ("counter", {}),
    "audit_violations": ("gauge", {"invariant": INVARIANTS}),
    "audit_last_run_timestamp_seconds": ("gauge", {}),
    "audit_interval_seconds": ("gauge", {}),
    "gauges_last_run_timestamp_seconds": ("gauge", {}),
    "alerts_received_total": ("counter", {"severity": "info warning high critical", "status": "firing resolved"}),
    "asyncio_tasks": ("gauge", {}),
    "asyncio_loop_lag_seconds": ("histogram", {}),
    "process_cpu_limit_cores": ("gauge", {}),
    "process_memory_limit_bytes": ("gauge", {}),
    "obs_label_values_rejected_total": ("counter", {"metric": OPEN}),
    "obs_log_redactions_total": ("counter", {"kind": "email phone body secret name"}),
    "obs_log_lines_dropped_total": ("counter", {"level": "routine urgent"}),
    "obs_spans_dropped_total": ("counter", {"reason": "queue_full export_failed evicted truncated"}),
    "obs_traces_kept_total": ("counter", {"reason": "head error remote"}),
}
ALIASES = {
    "http_request_duration_seconds": "http_request_duration_ms",
    "scheduling_book_duration_seconds": "scheduling_book_duration_ms",
    "booking_post_own_duration_seconds": "booking_post_p95_ms",
}

OF_EVERY_LINE = "timestamp level event component module service version"
OF_A_RUN = "run_id due_count attempted_count created_count skipped_count failed_count runtime_ms source dry_run"
OF_A_VERDICT = "operation appointment_id session_id user_id enforced correlation_id tenant_id"
OF_A_SOCKET = "session_id user_id connection_id correlation_id tenant_id"
LOG_EVENTS = {
    "http_request": ("info", "method route status latency_ms correlation_id"),
    "slow_operation": ("warning performance", "route latency_ms correlation_id"),
    "library_log": ("debug", "message logger"),
    "guard_blocked": ("warning", f"message {OF_A_VERDICT}"),
    "guard_allowed_with_warning": ("warning", f"message {OF_A_VERDICT}"),
    "guard_refused": ("info", f"error_code {OF_A_VERDICT}"),
    "decisions_not_written": ("warning error", "exception_type waiting"),
    "chat_message_stored": (
        "info message",
        "session_id user_id operation message_id duration_ms correlation_id tenant_id",
    ),
    "chat_connection_opened": ("info connection", OF_A_SOCKET),
    "chat_connection_closed": ("info connection", f"code duration_ms {OF_A_SOCKET}"),
    "chat_connection_refused": ("info connection", "error_code correlation_id"),
    "rooms_failed": ("warning error", "exception_type"),
    "socket_slots_failed": ("warning error", "exception_type"),
    "activity_not_written": ("warning error", "exception_type waiting"),
    "auth_failed": ("info security", "reason client_ip correlation_id"),
    "security_event": ("info security", "kind client_ip user_agent correlation_id"),
    "jwks_reload_failed": ("warning security", "exception_type"),
    "session_state_changed": ("info", "session_id status"),
    "session_charged": ("info", "session_id appointment_id units_added units_charged tenant_id"),
    "charges_refunded": ("info", "session_id appointment_id units tenant_id"),
    "settlement_failed": ("error error", "exception_type session_id"),
    "legacy_charged": ("info", "appointment_id status units_added units_charged tenant_id"),
    "legacy_triggers_disabled": ("info", "message command_name disabled_tenants tenants"),
    "legacy_trigger_run": ("info", "command_name processed skipped job_run_id disabled_tenants"),
    "legacy_trigger_failed": ("error error", "appointment_id exception_type"),
    "appointment_session_conversion": (
        "info",
        "appointment_id result session_id failure_reason error_message modality delay_ms source job_run_id tenant_id"
        " correlation_id",
    ),
    "appointment_auto_start_run": ("info", OF_A_RUN),
    "appointment_recovery_run": ("info", OF_A_RUN),
    "pulse_beat_failed": ("error error", "exception_type"),
    "outbox_dispatched": ("info", "event_name outbox_id attempts event_id consumer tenant_id"),
    "outbox_failed": (
        "warning error",
        "event_name outbox_id attempts consumer tenant_id error_message exception_type dead",
    ),
    "outbox_lane_failed": ("error error", "exception_type"),
    "webhook_disabled": ("warning", "endpoint_id tenant_id reason"),
    "doorbell_lost": ("warning error", "exception_type"),
    "alert_received": ("warning", "alert severity alert_component fingerprint started_at"),
    "alert_resolved": ("info", "alert severity alert_component fingerprint started_at resolved_at"),
    "alerts_not_understood": ("warning error", "number kept"),
    "flag_environment_shadowed": ("warning", "flag tenant_id target environment"),
    "flag_tripped": ("error error", "flag tenant_id requests refused"),
    "flags_not_followed": ("warning error", "exception_type"),
    "worker_started": ("info", "worker metrics_port"),
    "worker_stopped": ("info", "worker"),
    "log_lines_not_stored": ("warning error", "exception_type waiting"),
    "job_finished": ("info", "task result duration_ms"),
    "gauges_failed": ("error error", "exception_type task"),
    "cron_failed": ("error error", "exception_type task"),
    "audit_violation": ("error error", "invariant violations examples"),
    "audit_failed": ("error error", "exception_type"),
    "database_unavailable": ("warning error", "exception_type"),
    "unhandled_error": ("error error", "error_code exception_type error_message stack_fingerprint"),
}
"""Each with its least severe level and its category, and the fields that it always has."""
PHRASES = {
    "SessionContextGuard: Chat operation blocked",
    "SessionContextGuard: Billing blocked",
    "SessionContextGuard: Chat operation allowed without session context",
    "SessionContextGuard: Billing allowed without session context",
    "Legacy appointment triggers disabled",
}

SPANS = {
    "scheduling.book",
    "chat.send",
    "session.end",
    "billing.settle",
    "appointments.auto_start",
    "appointments.recover",
    "appointments.convert",
    "legacy.process_appointment_sessions",
    "legacy.activate_booked_appointments",
    "{consumer}.deliver",
    "arq.job {job.name}",
    "arq.enqueue {job.name}",
    "chat.frame",
    "guard.decide",
    "outbox.write",
    "outbox.dispatch",
    "redis.publish",
    "POST",
}

# By how urgent they are; the budgets of objectives are told by pages and by tickets.
ALERTS = {
    "critical": "AppointmentsDueBacklogCritical AppointmentConversionStalled AppointmentConversionJobMissing"
    " AppointmentConversionFailureRateCritical BillingBlocked LegacyTriggerProcessedSessionAppointment OutboxLag"
    " TargetDown ApiMissing DbSaturation AuditViolations AlertDeliveryFailing GaugesStale SLOErrorBudgetBurn",
    "high": "AppointmentsNeedAttention FlagTripped HighErrorRate OutboxDead WebhookDeliveriesFailing MemoryNearLimit"
    " DbPoolTimeouts RuleEvaluationFailing NotificationsDropped",
    "warning": "AppointmentsDueBacklog AppointmentConversionFailureRate ChatBlockedRatio GuardDecisionsDropped"
    " HighResponseTime EventLoopLag AuthFailures ChatConnectionSuccessLow WebhookDestinationForbidden DoorbellFailures"
    " AuditNotRunning LogLinesDropped SuspiciousAddress PrivilegeAttempts SLOErrorBudgetBurn",
    "info": "LogLinesNotStored Watchdog",
}
OBJECTIVES_OF_SERVICE = "availability booking sessions_on_time"
ROUTES = {
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
    "GET /problems/{code}",
    "GET /api/v1/me",
    "GET /api/v1/doctors",
    "GET /api/v1/appointments",
    "POST /api/v1/appointments",
    "GET /api/v1/appointments/{appointment_id}",
    "POST /api/v1/appointments/{appointment_id}/confirm",
    "POST /api/v1/appointments/{appointment_id}/cancel",
    "POST /api/v1/appointments/{appointment_id}/reschedule",
    "POST /api/v1/appointments/{appointment_id}/reschedule/accept",
    "POST /api/v1/appointments/{appointment_id}/reschedule/reject",
    "POST /api/v1/appointments/{appointment_id}/presence",
    "GET /api/v1/appointments/{appointment_id}/session",
    "GET /api/v1/sessions",
    "POST /api/v1/sessions",
    "GET /api/v1/sessions/{context}",
    "POST /api/v1/sessions/{context}/ring",
    "POST /api/v1/sessions/{context}/answer",
    "POST /api/v1/sessions/{context}/connected",
    "POST /api/v1/sessions/{context}/decline",
    "POST /api/v1/sessions/{context}/end",
    "POST /api/v1/sessions/{context}/deductions",
    "GET /api/v1/sessions/{context}/billing",
    "GET /api/v1/billing/balance",
    "POST /api/v1/admin/refunds",
    "POST /api/appointments/{appointment_id}/end-session",
    "POST /api/appointments/{appointment_id}/process-payment",
    "POST /api/text-appointments/process-deduction",
    "GET /api/v1/chat/{context}/messages",
    "POST /api/v1/chat/{context}/messages",
    "POST /api/v1/chat/{context}/messages/{message_id}/replies",
    "PUT /api/v1/chat/{context}/messages/{message_id}/reactions/{emoji}",
    "DELETE /api/v1/chat/{context}/messages/{message_id}/reactions/{emoji}",
    "PUT /api/v1/chat/{context}/typing",
    "DELETE /api/v1/chat/{context}/typing",
    "PUT /api/v1/chat/{context}/read",
    "POST /api/v1/socket-tickets",
    "GET /api/v1/notifications",
    "POST /api/v1/admin/users",
    "PATCH /api/v1/admin/users/{user_id}",
    "POST /api/v1/admin/subscriptions",
    "GET /api/v1/admin/conversions",
    "GET /api/v1/admin/rollout",
    "GET /api/v1/admin/decisions",
    "GET /api/v1/admin/audit-log",
    "GET /api/v1/admin/alerts",
    "GET /api/v1/admin/chat/alerts",
    "GET /api/v1/admin/flags",
    "PUT /api/v1/admin/flags/{flag}",
    "GET /api/v1/admin/outbox/dead",
    "POST /api/v1/admin/outbox/dead/{delivery_id}/replay",
    "GET /api/v1/admin/webhooks",
    "POST /api/v1/admin/webhooks",
    "GET /api/v1/admin/webhooks/{webhook_id}",
    "PATCH /api/v1/admin/webhooks/{webhook_id}",
    "DELETE /api/v1/admin/webhooks/{webhook_id}",
    "POST /api/v1/admin/webhooks/{webhook_id}/rotate-secret",
    "POST /api/v1/admin/webhooks/{webhook_id}/test",
    "GET /api/v1/admin/webhooks/{webhook_id}/deliveries",
    "POST /api/v1/admin/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver",
}
BODIES = {
    "AppointmentOut": "id patient_id doctor_id modality status starts_at ends_at duration_minutes reason session_id"
    " session_context created_at updated_at",
    "SessionPollOut": "appointment_id status modality starts_at session_id session_context session_status"
    " response_deadline retry_after",
    "SessionOut": "id context kind modality source status appointment_id patient_id doctor_id created_at"
    " response_deadline activated_at connected_at ended_at end_reason units_charged remaining_seconds",
    "EndedOut": "session billing already_ended",
    "BillingOut": "units_charged units_added payouts",
    "DeductionIn": "appointment_id sessions_to_deduct reason",
    "BillOut": "appointment_id status units_charged units_added session_context",
    "DeductedOut": "units_charged units_added",
    "LedgerOut": "session_context units_charged units_refunded items",
    "LineOut": "id kind unit reverses created_at entries",
    "EntryOut": "account subscription_id doctor_id commodity amount",
    "BalanceOut": "units wallets",
    "UnitsOut": "text voice video",
    "WalletOut": "currency balance_minor",
    "RefundIn": "context unit reason",
    "RefundOut": "units_refunded items",
    "MessageOut": "id seq client_message_id sender kind body media_url reply_to reactions sent_at",
    "HistoryOut": "items has_more last_seq",
    "NotificationOut": "id kind appointment_id session_context created_at read_at",
    "DoctorOut": "id name country",
    "TicketIn": "context",
    "TicketOut": "ticket expires_at",
    "UserOut": "id tenant_id role name country active",
    "RolloutOut": "since flags",
    "FlagReportOut": "flag enforced_when requests would_be_refused refused users first_seen last_seen safe_to_enforce"
    " why callers",
    "CallersOut": "operation client would_be_refused refused users first_seen last_seen",
    "DecisionOut": "id at operation identifier appointment_id session_id user_id role client verdict reason flag flags"
    " correlation_id",
    "AuditEntryOut": "id at actor_id action subject details correlation_id",
    "AlertOut": "id source fingerprint status name severity component metric value threshold labels annotations"
    " started_at resolved_at last_seen_at deliveries",
    "DeadDeliveryOut": "id event_id event_name consumer aggregate attempts last_error response_status occurred_at"
    " dead_at",
    "RegisterWebhook": "url description events",
    "ChangeWebhook": "enabled description events",
    "WebhookOut": "id url description events enabled disabled_at disabled_reason created_at",
    "RegisteredWebhookOut": "id url description events enabled disabled_at disabled_reason created_at secret",
    "RotatedSecretOut": "secret old_secret_expires_at",
    "WebhookDeliveryOut": "id event_id type status attempts response_status last_error occurred_at next_attempt_at"
    " delivered_at dead_at",
    "FlagsOut": "items",
    "FlagOut": "flag enabled origin tripwire",
    "TripwireOut": "share minutes minimum",
    "Problem": "type title status detail instance code correlation_id appointment_id session_id session_context"
    " retry_after next_action errors",
    "BookAppointment": "doctor_id patient_id modality starts_at duration_minutes reason",
    "StartSession": "doctor_id modality reason",
    "SendMessageIn": "client_message_id body kind media_url",
    "CreateUser": "role name country active",
    "SetFlag": "enabled tripwire",
    "TripwireIn": "share minutes minimum",
    "CreateSubscription": "patient_id plan starts_at ends_at text_sessions_remaining voice_calls_remaining"
    " video_calls_remaining",
}


def test_refusals_keep_their_codes_their_status_and_what_to_do_next() -> None:
    assert {reason.code: STATUS[reason.kind] for reason in Reason} == REFUSALS
    assert {reason.code: reason.next_action for reason in Reason if reason.next_action} == NEXT_ACTIONS


def test_flags_keep_their_names_everywhere() -> None:
    assert {flag.value for flag in Flag} == set(FlagSettings.model_fields) == FLAGS


def test_operations_and_events_keep_their_names() -> None:
    assert set(OPERATIONS) == {*CHAT.split(), *OPERATIONS_OF_SESSIONS.split()}
    assert list(EventName) == EVENTS.split()


def test_metrics_keep_their_names_their_labels_and_the_values_of_those() -> None:
    catalogued = {
        spec.name: (
            spec.kind,
            {label.name: None if label.values is None else set(map(str, label.values)) for label in spec.labels},
        )
        for spec in (*OWN, *CATALOGUE)
    }
    assert catalogued == {
        name: (kind, {label: values and set(values.split()) for label, values in labels.items()})
        for name, (kind, labels) in METRICS.items()
    }
    aliases = {spec.name: spec.source_alias for spec in CATALOGUE if spec.source_alias}
    assert aliases == ALIASES


def test_operators_are_told_of_every_metric_and_span() -> None:
    told = (ROOT / "docs/telemetry.md").read_text()
    listed = (ROOT / "docs/metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram) \|", listed, re.MULTILINE))
    assert rows == {spec.name: spec.kind for spec in (*CATALOGUE, *OWN)}
    words = set(re.findall(r"`([\w.{} ]+)`", told))
    spelled = {"{consumer}.deliver": "notifications.deliver", "arq.job {job.name}": "arq.job {name}"}
    spelled["arq.enqueue {job.name}"] = "arq.enqueue {name}"
    assert {spelled.get(span, span) for span in SPANS} - words == set()


def test_operators_are_told_of_every_log_event() -> None:
    told = (ROOT / "docs/telemetry.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w*) ?\| [^|]+ \| ([`\w, ]+) \|$", told, re.MULTILINE)
    documented = {
        name: (level, category, fields.replace("`", "").split(", ")) for name, level, category, fields in rows
    }
    assert documented == {
        event.name: (event.level, event.category or "", list(event.required)) for event in registry.LOG_EVENTS.values()
    }


def calls(*functions: str) -> Iterator[ast.Call]:
    """The calls of functions or methods of these names, outside of the command line."""
    for _, tree in sources("libs", "services/api", "services/worker"):
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in functions and node.args:
                    yield node


def strings() -> set[str]:
    return {
        node.value
        for _, tree in sources("libs", "services/api", "services/worker")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_log_events_keep_their_names_their_fields_and_how_severe_they_are() -> None:
    registered = {
        event.name: (" ".join(filter(None, (event.level, event.category))), set(event.required))
        for event in registry.LOG_EVENTS.values()
    }
    assert registered == {name: (kind, set(fields.split())) for name, (kind, fields) in LOG_EVENTS.items()}
    assert set(OF_EVERY_LINE.split()) == set(EVERY_LINE)
    assert strings() >= PHRASES


# The event of a run is looked up by the task, and its fields are those of the run.
RUNS = {"appointment_auto_start_run", "appointment_recovery_run"}
# What surrounds a line may give it these.
BOUND = {"correlation_id", "tenant_id", "user_id", "session_id", "connection_id", "source", "job_run_id"}
OF_AN_EXCEPTION = {"exception_type", "error_message", "stack_fingerprint"}


def logged(event: str, call: ast.Call) -> list[str]:
    """What is wrong with a call that logs an event."""
    given = {keyword.arg for keyword in call.keywords}
    known = registry.LOG_EVENTS.get(event)
    if known is None:
        return ["it is not registered"]
    if "exc_info" in given:
        given |= OF_AN_EXCEPTION
    faults = [] if None in given else [f"it lacks {name}" for name in {*known.required} - BOUND - given]
    level = call.func.attr if isinstance(call.func, ast.Attribute) else known.level
    if SEVERITY.get(level, 0) < SEVERITY[known.level]:
        faults.append("it is less severe")
    return faults


@pytest.mark.parametrize(
    ("code", "faulty"),
    [
        ("_log.info('unheard_of', task=1)", True),
        ("_log.error('cron_failed', exc_info=error)", True),
        ("_log.info('cron_failed', exc_info=error, task='x')", True),
        ("_log.error('cron_failed', exc_info=error, task='x')", False),
        ("tell('cron_failed', exc_info=error, task='x')", False),
    ],
)
def test_a_line_that_lacks_something_would_be_noticed(code: str, faulty: bool) -> None:
    call: Any = ast.parse(code, mode="eval").body
    assert bool(logged(call.args[0].value, call)) is faulty


def test_whatever_is_logged_is_a_registered_event_with_all_of_its_fields() -> None:
    found = [
        (str(call.args[0].value), call)
        for call in calls("debug", "info", "warning", "error", "tell", "told")
        if isinstance(call.args[0], ast.Constant)
    ]
    assert [(event, faults) for event, call in found if (faults := logged(event, call))] == []
    assert {event for event, _ in found} | RUNS == registry.LOG_EVENTS.keys()
    assert strings() >= RUNS


def test_spans_keep_their_names() -> None:
    names = {
        ast.unparse(call.args[0]).removeprefix("f").strip("'") for call in calls("span", "record_span", "record_step")
    }
    # The span of a run is looked up by the task; that of a statement has the name of what it does.
    looked_up = {"appointments.auto_start", "appointments.recover", "legacy.activate_booked_appointments"}
    assert names - {"_SPANS[run.task]", "name"} | looked_up == SPANS
    assert looked_up <= strings()
    assert {consumer.value for consumer in Consumer} == {"notifications", "webhook"}


class Unwilling:
    async def deliver(self, events: Sequence[Event]) -> None:
        raise RuntimeError("not today")


async def everything_happens(api: Api, clinic: Clinic) -> None:
    """Leads to every log event that does not need a fault."""
    message = {"client_message_id": "1", "body": "Hello"}
    session = await clinic.session()
    patient, doctor = api.as_(session.patient), api.as_(session.doctor)
    await api.anonymous.get("/api/v1/me")
    await patient.post(f"/chat/{session.context}/messages", json=message)
    await doctor.post(f"/chat/{session.context}/messages", json={"client_message_id": "2", "body": "Hello"})
    await patient.post(f"/chat/{session.appointment_id}/messages", json=message)
    early = await clinic.appointment(patient=session.patient, starts_in=timedelta(hours=1))
    await patient.post(f"/chat/{early}/messages", json=message)
    async with following(api, session.patient, session.context):
        await patient.post(f"/sessions/{session.context}/end")
    async with opened(api, session.patient, session.context) as socket:
        await socket.receive()
    await patient.post(f"/chat/{session.context}/messages", json=message | {"client_message_id": "3"})
    await clinic.dispatch()
    reporter, converter = Reporter(clinic.metrics), clinic.converter()
    reporter.finished(await converter.auto_start(wait=True))
    reporter.finished(await converter.recover(lookback=None, limit=1))
    async with transaction(clinic.database, clinic.bell) as tx:
        await append(tx, EventName.SESSION_ENDED, tenant_id=clinic.tenant_id, aggregate="test:1", payload={})
    await Dispatcher(clinic.database, {Consumer.NOTIFICATIONS: Unwilling()}, clinic.metrics).dispatch(Lane.URGENT)


HAPPEN = {
    "http_request",
    "auth_failed",
    "guard_blocked",
    "guard_allowed_with_warning",
    "guard_refused",
    "chat_message_stored",
    "chat_connection_opened",
    "chat_connection_closed",
    "chat_connection_refused",
    "session_state_changed",
    "appointment_auto_start_run",
    "appointment_recovery_run",
    "appointment_session_conversion",
    "outbox_dispatched",
    "outbox_failed",
}


async def test_log_lines_keep_their_fields(make_api: MakeApi, clinic: Clinic, tmp_path: Path) -> None:
    log = tmp_path / "api.jsonl"
    api = await make_api(log_file=log, ENFORCE_SESSION_GATED_CHAT=True, ALLOW_LEGACY_APPOINTMENT_CHAT=True)
    await everything_happens(api, clinic)

    async def lines() -> list[dict[str, Any]]:
        written = lines_of(log)
        return written if {line["event"] for line in written} >= HAPPEN else []

    for line in await until(lines):
        assert faults_of(line) == [], line
        assert line["module"] in MODULES.split()
        assert line["service"] == "sessiongate-api"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"])


@pytest.fixture
async def document(api: Api) -> Any:
    return api.app.openapi()


async def test_addresses_stay_where_they_are(document: Any) -> None:
    routes = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert routes == ROUTES


FRAMES = {
    "hello": "type after_seq after_revision",
    "message": "type client_message_id body kind media_url",
    "reply": "type client_message_id body message_id",
    "reaction": "type message_id emoji on",
    "typing": "type on",
    "read": "type seq",
    "ping": "type",
}
SERVER_FRAMES = {
    "welcome": "type session last_seq revision",
    "message": "type message",
    "gap": "type from_seq to_seq",
    "caught_up": "type",
    "ack": "type client_message_id message",
    "reaction": "type message_id user_id emoji on revision",
    "typing": "type user_id on",
    "read": "type user_id seq",
    "session": "type session",
    "pong": "type",
}


@pytest.mark.parametrize(("union", "listed"), [(ClientFrame, FRAMES), (ServerFrame, SERVER_FRAMES)])
def test_frames_keep_their_types_and_fields(union: Any, listed: dict[str, str]) -> None:
    fields = {get_args(model.model_fields["type"].annotation)[0]: model.model_fields for model in get_args(union)}
    assert {type_: set(names) for type_, names in fields.items()} == {
        type_: set(names.split()) for type_, names in listed.items()
    }
    described = (ROOT / "docs/socket.md").read_text()
    assert [type_ for type_ in (*listed, "refused") if f"`{type_}`" not in described] == []


async def test_bodies_keep_their_fields(document: Any) -> None:
    schemas = document["components"]["schemas"]
    assert {name: set(schemas[name]["properties"]) for name in BODIES} == {
        name: set(fields.split()) for name, fields in BODIES.items()
    }


async def test_problems_are_of_the_standard_shape(api: Api, clinic: Clinic) -> None:
    session = await clinic.session()
    response = await api.as_(session.patient).get(f"/chat/{session.appointment_id}/messages")
    problem = response.json()
    assert response.headers["Content-Type"] == "application/problem+json"
    assert problem.pop("correlation_id") == response.headers["X-Correlation-ID"]
    assert problem.pop("title")
    assert problem.pop("detail")
    assert problem == {
        "type": "/problems/SESSION_CONTEXT_REQUIRED",
        "status": 400,
        "instance": f"/api/v1/chat/{session.appointment_id}/messages",
        "code": "SESSION_CONTEXT_REQUIRED",
        "appointment_id": session.appointment_id,
        "session_id": session.ref.id,
        "session_context": session.context,
        "next_action": {"method": "GET", "href": f"/api/v1/appointments/{session.appointment_id}/session"},
    }
