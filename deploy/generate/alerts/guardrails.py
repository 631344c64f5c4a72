"""What the guard refuses, and what must have passed it by."""

from typing import Final

from libs.observability.rules import Alert

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
