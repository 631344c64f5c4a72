"""The names of the commands that act on appointments by themselves, without a session: label values and words in
logs."""

from enum import StrEnum


class Command(StrEnum):
    PROCESS_APPOINTMENT_SESSIONS = "process_appointment_sessions"
    ACTIVATE_BOOKED_APPOINTMENTS = "activate_booked_appointments"
