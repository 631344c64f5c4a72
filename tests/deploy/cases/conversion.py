"""Cases of appointments becoming sessions."""

from typing import Final

from tests.deploy.cases.case import Case, Firing, Quiet

ATTEMPTED: Final = 'appointment_session_conversion_attempted_total{task="auto_start"}'
FAILED: Final = 'appointment_session_conversion_failed_total{reason="unknown_error"}'
BUSY: Final = 'appointment_session_conversion_failed_total{reason="createSession_conflict_existing_session"}'

# One appointment that fails whenever it is tried, after pauses of 1, 2, 4 … minutes: how often it has, by the minute.
ONE_BROKEN: Final = " ".join(str(sum(at <= minute for at in (1, 2, 4, 8, 16, 32, 64))) for minute in range(80))

CONVERSION: Final[tuple[Case, ...]] = (
    Firing(
        "AppointmentsDueBacklog",
        {
            'appointments_due_count{job="sessiongate-api"}': "0+0x10",
            'appointments_due_count{job="sessiongate-worker"}': "11+0x10",
        },
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
        {"appointments_due_count": "8+0x20", "appointments_overdue": "8+0x20", ATTEMPTED: "7+0x20"},
        after=15,
        says="Appointments that could be converted: 8. None was tried within five minutes.",
        value="8",
    ),
    # Some wait for their next attempt, and nothing else is to be done.
    Quiet(
        "AppointmentConversionStalled",
        {"appointments_due_count": "0+1x30", "appointments_overdue": "0+0x30", ATTEMPTED: "7+0x30"},
        after=30,
    ),
    Quiet("AppointmentConversionStalled", {"appointments_overdue": "0+1x30", ATTEMPTED: "7+1x30"}, after=30),
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
            'appointment_conversion_last_run_timestamp_seconds{task="auto_start",job="sessiongate-api"}': "0+0x30",
        },
        after=30,
    ),
    Firing(
        "AppointmentConversionFailureRate",
        {
            ATTEMPTED: "0+100x20",
            'appointment_session_conversion_failed_total{reason="db_update_failed"}': "0+1x20",
            FAILED: "0+2x20",
        },
        after=15,
        says="3% of conversions failed over ten minutes.",
        value="0.03",
    ),
    Quiet(
        "AppointmentConversionFailureRate",
        {
            ATTEMPTED: "0+100x20",
            FAILED: "0+2x20",
        },
        after=15,
    ),
    Quiet(
        "AppointmentConversionFailureRate",
        {
            ATTEMPTED: "5+0x20",
            FAILED: "5+0x20",
        },
        after=15,
    ),
    # One that fails again and again, and one that waits for a busy doctor.
    *(
        Quiet("AppointmentConversionFailureRate", {ATTEMPTED: ONE_BROKEN, FAILED: ONE_BROKEN}, after=after)
        for after in (2, 5, 9, 16, 17, 33, 65)
    ),
    Quiet("AppointmentConversionFailureRate", {ATTEMPTED: "0+6x30", BUSY: "0+6x30"}, after=15),
    Firing(
        "AppointmentConversionFailureRateCritical",
        {
            ATTEMPTED: "0+100x10",
            FAILED: "0+11x10",
        },
        after=10,
        says="11% of conversions failed over five minutes.",
        value="0.11",
    ),
    Quiet(
        "AppointmentConversionFailureRateCritical",
        {
            ATTEMPTED: "0+100x10",
            FAILED: "0+10x10",
        },
        after=10,
    ),
    *(
        Quiet("AppointmentConversionFailureRateCritical", {ATTEMPTED: ONE_BROKEN, FAILED: ONE_BROKEN}, after=after)
        for after in (2, 5, 9, 16, 17, 33, 65)
    ),
    Quiet("AppointmentConversionFailureRateCritical", {ATTEMPTED: "0+6x30", BUSY: "0+6x30"}, after=15),
    Firing(
        "AppointmentsNeedAttention",
        {"appointments_needs_attention": "2+0x10"},
        after=6,
        says="Appointments whose conversion has failed too often, and waits for an operator: 2.",
        value="2",
    ),
    Quiet("AppointmentsNeedAttention", {"appointments_needs_attention": "0+0x10"}, after=10),
)
