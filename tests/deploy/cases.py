"""For each alert what it must tell, and what it must not: series by the minute, in the notation of promtool."""

from dataclasses import dataclass
from typing import Final

PROBES: Final = 'route="/healthz",method="GET",status="200"'


@dataclass(frozen=True)
class Firing:
    """The alert is there after so many minutes, has the labels that its query keeps, and says this."""

    alert: str
    series: dict[str, str]
    after: int
    says: str
    value: str
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Quiet:
    """The alert is not there, for all that is going on."""

    alert: str
    series: dict[str, str]
    after: int


Case = Firing | Quiet

CONVERSION: Final[tuple[Case, ...]] = (
    Firing(
        "AppointmentsDueBacklog",
        {'appointments_due_count{job="api"}': "0+0x10", 'appointments_due_count{job="worker"}': "11+0x10"},
        after=6,
        says="11 confirmed appointments are due and have no session.",
        value="11",
    ),
    Quiet("AppointmentsDueBacklog", {"appointments_due_count": "10+0x30"}, after=30),
    Quiet("AppointmentsDueBacklog", {"appointments_due_count": "0 0 40 40 40 0 0 0"}, after=7),
    Firing(
        "AppointmentsDueBacklogCritical",
        {"appointments_due_count": "51+0x10"},
        after=6,
        says="51 confirmed appointments are due and have no session.",
        value="51",
    ),
    Quiet("AppointmentsDueBacklogCritical", {"appointments_due_count": "50+0x30"}, after=30),
    Firing(
        "AppointmentConversionStalled",
        {"appointments_due_count": "0+1x20", "appointment_sessions_created_total": "7+0x20"},
        after=15,
        says="5 more appointments are due than five minutes ago, and no session was created.",
        value="5",
    ),
    Quiet(
        "AppointmentConversionStalled",
        {"appointments_due_count": "0+1x30", "appointment_sessions_created_total": "7+1x30"},
        after=30,
    ),
    Quiet(
        "AppointmentConversionStalled",
        {"appointments_due_count": "9+0x30", "appointment_sessions_created_total": "7+0x30"},
        after=30,
    ),
    Firing(
        "AppointmentConversionJobMissing",
        {'appointment_conversion_last_run_timestamp_seconds{task="auto_start"}': "0+60x10 600+0x10"},
        after=18,
        says="No worker has looked for due appointments within five minutes.",
        value="480",
    ),
    Firing(
        "AppointmentConversionJobMissing",
        {},
        after=10,
        says="No worker has looked for due appointments within five minutes.",
        value="600",
    ),
    Quiet(
        "AppointmentConversionJobMissing",
        {
            'appointment_conversion_last_run_timestamp_seconds{task="auto_start"}': "0+60x30",
            'appointment_conversion_last_run_timestamp_seconds{task="auto_start",job="api"}': "0+0x30",
        },
        after=30,
    ),
    Firing(
        "AppointmentConversionFailureRate",
        {
            'appointment_session_conversion_attempted_total{task="auto_start"}': "0+100x20",
            'appointment_session_conversion_failed_total{reason="db_update_failed"}': "0+1x20",
            'appointment_session_conversion_failed_total{reason="unknown_error"}': "0+2x20",
        },
        after=15,
        says="3% of conversions failed over ten minutes.",
        value="0.03",
    ),
    Quiet(
        "AppointmentConversionFailureRate",
        {
            'appointment_session_conversion_attempted_total{task="auto_start"}': "0+100x20",
            'appointment_session_conversion_failed_total{reason="unknown_error"}': "0+2x20",
        },
        after=15,
    ),
    Quiet(
        "AppointmentConversionFailureRate",
        {
            'appointment_session_conversion_attempted_total{task="auto_start"}': "5+0x20",
            'appointment_session_conversion_failed_total{reason="unknown_error"}': "5+0x20",
        },
        after=15,
    ),
    Firing(
        "AppointmentConversionFailureRateCritical",
        {
            'appointment_session_conversion_attempted_total{task="auto_start"}': "0+100x10",
            'appointment_session_conversion_failed_total{reason="unknown_error"}': "0+11x10",
        },
        after=10,
        says="11% of conversions failed over five minutes.",
        value="0.11",
    ),
    Quiet(
        "AppointmentConversionFailureRateCritical",
        {
            'appointment_session_conversion_attempted_total{task="auto_start"}': "0+100x10",
            'appointment_session_conversion_failed_total{reason="unknown_error"}': "0+10x10",
        },
        after=10,
    ),
    Firing(
        "AppointmentsNeedAttention",
        {"appointments_needs_attention": "2+0x10"},
        after=6,
        says="The conversion of 2 appointments has failed too often, and waits for an operator.",
        value="2",
    ),
    Quiet("AppointmentsNeedAttention", {"appointments_needs_attention": "0+0x10"}, after=10),
)

GUARDRAILS: Final[tuple[Case, ...]] = (
    Firing(
        "ChatBlockedRatio",
        {
            'chat_requests_total{operation="send_message"}': "0+60x30",
            'chat_requests_total{operation="get_messages"}': "0+40x30",
            'chat_blocked_session_context_required_total{operation="send_message"}': "0+11x30",
        },
        after=20,
        says="11% of chat requests over ten minutes named an appointment that has a session.",
        value="0.11",
    ),
    Quiet(
        "ChatBlockedRatio",
        {
            'chat_requests_total{operation="send_message"}': "0+100x30",
            'chat_blocked_session_context_required_total{operation="send_message"}': "0+10x30",
        },
        after=30,
    ),
    # The first refusal ever is told, because its series was there at 0.
    Firing(
        "BillingBlocked",
        {
            'billing_blocked_session_context_required_total{endpoint="end_session"}': "0 0 0 0 0 0 0 0 0 0 1 1",
            'billing_blocked_session_context_required_total{endpoint="process_payment"}': "3+0x11",
        },
        after=11,
        says="Calls of end_session were refused because the appointment has a session.",
        value="1",
        labels=(("endpoint", "end_session"),),
    ),
    Quiet(
        "BillingBlocked", {'billing_blocked_session_context_required_total{endpoint="end_session"}': "3+0x30"}, after=30
    ),
    Firing(
        "FlagTripped",
        {'flag_tripwire_total{flag="ENFORCE_SESSION_GATED_CHAT"}': "0 0 0 0 0 0 0 0 0 0 1 1"},
        after=11,
        says="ENFORCE_SESSION_GATED_CHAT refused more than its tripwire allows, and is off.",
        value="1",
        labels=(("flag", "ENFORCE_SESSION_GATED_CHAT"),),
    ),
    Quiet("FlagTripped", {'flag_tripwire_total{flag="ENFORCE_SESSION_GATED_CHAT"}': "1+0x20"}, after=20),
    Firing(
        "LegacyTriggerProcessedSessionAppointment",
        {
            'legacy_trigger_appointments_processed_total{command_name="activate_booked_appointments",'
            'has_session="true"}': "0 0 0 0 0 0 0 0 0 0 1 1"
        },
        after=11,
        says="activate_booked_appointments must leave appointments that have a session alone.",
        value="1",
        labels=(("command_name", "activate_booked_appointments"),),
    ),
    Quiet(
        "LegacyTriggerProcessedSessionAppointment",
        {
            'legacy_trigger_appointments_processed_total{command_name="activate_booked_appointments",'
            'has_session="false"}': "0+5x20"
        },
        after=20,
    ),
    Firing(
        "GuardDecisionsDropped",
        {'guard_decisions_dropped_total{verdict="allowed"}': "0 0 0 0 0 0 0 0 0 0 40 40"},
        after=11,
        says="Of decisions that were allowed, some could not be written down.",
        value="40",
        labels=(("verdict", "allowed"),),
    ),
    Quiet("GuardDecisionsDropped", {'guard_decisions_dropped_total{verdict="allowed"}': "40+0x20"}, after=20),
)


def _requests(status: str, values: str) -> dict[str, str]:
    return {
        f'http_request_duration_seconds_count{{route="/api/v1/me",method="GET",status="{status}"}}': values,
        f"http_request_duration_seconds_count{{{PROBES}}}": "0+1000x60",
    }


def _durations(metric: str, labels: str, *, below: str, above: str, many: int) -> dict[str, str]:
    """So many observations a minute, all of them between two bounds of the histogram."""
    return {
        f'{metric}_bucket{{{labels}le="{below}"}}': "0+0x60",
        f'{metric}_bucket{{{labels}le="{above}"}}': f"0+{many}x60",
        f'{metric}_bucket{{{labels}le="+Inf"}}': f"0+{many}x60",
    }


REQUESTS_AND_CHAT: Final[tuple[Case, ...]] = (
    Firing(
        "HighErrorRate",
        _requests("200", "0+94x60") | _requests("500", "0+4x60") | _requests("503", "0+2x60"),
        after=15,
        says="6% of requests were answered with 5xx.",
        value="0.06",
    ),
    Quiet("HighErrorRate", _requests("200", "0+95x60") | _requests("500", "0+5x60"), after=30),
    Quiet("HighErrorRate", _requests("200", "0+50x60") | _requests("400", "0+50x60"), after=30),
    # Half of the requests are quick, and probes do not count.
    Firing(
        "HighResponseTime",
        _durations("http_request_duration_seconds", 'route="/api/v1/me",', below="2.5", above="5.0", many=10)
        | _durations("http_request_duration_seconds", 'route="/healthz",', below="0.0", above="0.005", many=1000),
        after=15,
        says="One request in twenty takes longer than 4.875s.",
        value="4.875",
    ),
    Quiet(
        "HighResponseTime",
        _durations("http_request_duration_seconds", 'route="/api/v1/me",', below="0.5", above="1.0", many=10),
        after=30,
    ),
    Firing(
        "EventLoopLag",
        _durations("asyncio_loop_lag_seconds", 'job="api",instance="api:8000",', below="0.5", above="1.0", many=10),
        after=15,
        says="The event loop of api:8000 lags by 995ms.",
        value="0.995",
        labels=(("job", "api"), ("instance", "api:8000")),
    ),
    Quiet(
        "EventLoopLag",
        _durations("asyncio_loop_lag_seconds", 'job="api",instance="api:8000",', below="0.1", above="0.25", many=10),
        after=30,
    ),
    Firing(
        "AuthFailures",
        {
            'auth_failures_total{reason="expired"}': "0+6x10",
            'auth_failures_total{reason="invalid_token"}': "0+5x10",
        },
        after=5,
        says="11 requests in a minute had no valid token.",
        value="11",
    ),
    Quiet("AuthFailures", {'auth_failures_total{reason="expired"}': "0+10x10"}, after=10),
    Firing(
        "ChatConnectionSuccessLow",
        {
            "chat_connections_opened_total": "0+94x20",
            'chat_connection_failures_total{reason="upgrade"}': "0+4x20",
            'chat_connection_failures_total{reason="timeout"}': "0+2x20",
        },
        after=15,
        says="Only 94% of sockets were opened.",
        value="0.94",
    ),
    Quiet(
        "ChatConnectionSuccessLow",
        {
            "chat_connections_opened_total": "0+95x20",
            'chat_connection_failures_total{reason="upgrade"}': "0+5x20",
        },
        after=20,
    ),
    Quiet(
        "ChatConnectionSuccessLow",
        {"chat_connections_opened_total": "0+0x20", 'chat_connection_failures_total{reason="upgrade"}': "0+0x20"},
        after=20,
    ),
)

DELIVERY: Final[tuple[Case, ...]] = (
    Firing(
        "OutboxLag",
        {"outbox_dispatch_lag_seconds": "61+0x20"},
        after=11,
        says="What is due in the outbox has waited for 1m 1s.",
        value="61",
    ),
    Quiet("OutboxLag", {"outbox_dispatch_lag_seconds": "60+0x20"}, after=20),
    Quiet("OutboxLag", {"outbox_dispatch_lag_seconds": "0+60x8 0+0x20"}, after=12),
    Firing(
        "OutboxDead",
        {"outbox_dead": "1+0x10"},
        after=6,
        says="1 deliveries have failed six times and are not tried any more.",
        value="1",
    ),
    Quiet("OutboxDead", {"outbox_dead": "0+0x10"}, after=10),
    Firing(
        "WebhookDeliveriesFailing",
        {
            'webhook_deliveries_total{result="delivered"}': "9+0x30",
            'webhook_deliveries_total{result="unreachable"}': "0+1x30",
            'webhook_deliveries_total{result="timeout"}': "0+1x30",
        },
        after=20,
        says="All of 30 attempts within a quarter of an hour met no receiver.",
        value="30",
    ),
    # One endpoint is gone, others are not.
    Quiet(
        "WebhookDeliveriesFailing",
        {
            'webhook_deliveries_total{result="delivered"}': "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1",
            'webhook_deliveries_total{result="unreachable"}': "0+9x20",
        },
        after=20,
    ),
    Quiet(
        "WebhookDeliveriesFailing",
        {
            'webhook_deliveries_total{result="delivered"}': "9+0x30",
            'webhook_deliveries_total{result="unreachable"}': "0 0 0 0 0 1 2 3 4 5 6 6 6 6 6 6",
        },
        after=15,
    ),
    Firing(
        "WebhookDestinationForbidden",
        {'webhook_deliveries_total{result="forbidden"}': "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 2 2"},
        after=16,
        says="2 deliveries were not made because of where they led.",
        value="2",
    ),
    Quiet("WebhookDestinationForbidden", {'webhook_deliveries_total{result="rejected"}': "0+2x20"}, after=20),
    Firing(
        "DoorbellFailures",
        {'doorbell_failures_total{job="api"}': "0+2x20", 'doorbell_failures_total{job="worker"}': "0+0x20"},
        after=11,
        says="api cannot ring: notifications may be a second late, messages to sockets two.",
        value="10",
        labels=(("job", "api"),),
    ),
    Quiet("DoorbellFailures", {'doorbell_failures_total{job="api"}': "0 0 1 1 1 1 1 1 1 1 1 1 1"}, after=11),
)

PLATFORM: Final[tuple[Case, ...]] = (
    Firing(
        "TargetDown",
        {'up{job="worker",instance="worker:9101"}': "1 1 0 0 0 0", 'up{job="api",instance="api:8000"}': "1+0x5"},
        after=4,
        says="worker at worker:9101 tells no metrics.",
        value="0",
        labels=(("job", "worker"), ("instance", "worker:9101")),
    ),
    Quiet("TargetDown", {'up{job="worker",instance="worker:9101"}': "1 1 0 0 1 1 1"}, after=6),
    Firing(
        "ApiMissing",
        {'build_info{service="sessiongate-worker"}': "1+0x10"},
        after=3,
        says="Prometheus knows of no API at all.",
        value="0",
    ),
    Quiet("ApiMissing", {'build_info{service="sessiongate-api"}': "1+0x10"}, after=10),
    Firing(
        "DbSaturation",
        {
            'db_connections_in_use{pool="api",instance="api:8000"}': "17+0x20",
            'db_connections_max{pool="api",instance="api:8000"}': "20+0x20",
        },
        after=11,
        says="85% of the connections of api:8000 are in use.",
        value="0.85",
        labels=(("pool", "api"), ("instance", "api:8000")),
    ),
    Quiet(
        "DbSaturation",
        {
            'db_connections_in_use{pool="api",instance="api:8000"}': "16+0x20",
            'db_connections_max{pool="api",instance="api:8000"}': "20+0x20",
            'db_connections_in_use{pool="worker",instance="api:8000"}': "0+0x20",
            'db_connections_max{pool="worker",instance="api:8000"}': "0+0x20",
        },
        after=20,
    ),
    Firing(
        "AuditViolations",
        {'audit_violations{invariant="ledger_sums_to_zero"}': "3+0x5"},
        after=1,
        says="3 rows violate ledger_sums_to_zero.",
        value="3",
        labels=(("invariant", "ledger_sums_to_zero"),),
    ),
    Quiet("AuditViolations", {'audit_violations{invariant="ledger_sums_to_zero"}': "0+0x5"}, after=5),
    Firing(
        "AuditNotRunning",
        {"audit_last_run_timestamp_seconds": "0+0x120"},
        after=91,
        says="The last audit ended more than an hour ago, or there was none.",
        value="5460",
    ),
    Quiet("AuditNotRunning", {"audit_last_run_timestamp_seconds": "0+60x60 3600+0x60"}, after=120),
    Firing(
        "LogLinesDropped",
        {'obs_log_lines_dropped_total{level="routine",job="api"}': "0 0 0 0 0 0 0 0 0 0 5 5"},
        after=11,
        says="api has lost 5 lines (routine).",
        value="5",
        labels=(("level", "routine"), ("job", "api")),
    ),
    Quiet("LogLinesDropped", {'obs_log_lines_dropped_total{level="routine",job="api"}': "5+0x20"}, after=20),
    Firing(
        "AlertDeliveryFailing",
        {'alertmanager_notifications_failed_total{integration="webhook"}': "0 0 0 0 0 0 0 0 0 0 2 2"},
        after=11,
        says="Alertmanager failed 2 times to tell a webhook.",
        value="2",
        labels=(("integration", "webhook"),),
    ),
    Quiet(
        "AlertDeliveryFailing", {'alertmanager_notifications_failed_total{integration="webhook"}': "2+0x20"}, after=20
    ),
)

CASES: Final = (*CONVERSION, *GUARDRAILS, *REQUESTS_AND_CHAT, *DELIVERY, *PLATFORM)
