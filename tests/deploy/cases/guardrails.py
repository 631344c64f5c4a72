"""Cases of the guard, the flags and the legacy commands."""

from typing import Final

from tests.deploy.cases.case import Case, Firing, Quiet

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
