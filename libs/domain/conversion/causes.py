"""Why a conversion fails: the rule that failed decides, never a search in error texts."""

from enum import StrEnum
from typing import Final, NamedTuple


class FailureReason(StrEnum):
    """The categories of failed conversions: label values and words in logs."""

    INVALID_APPOINTMENT_STATE = "invalid_appointment_state"
    MISSING_DOCTOR_OR_PATIENT = "missing_doctor_or_patient"
    VALIDATION_FAILED = "createSession_validation_failed"
    CONFLICT_EXISTING_SESSION = "createSession_conflict_existing_session"
    DB_UPDATE_FAILED = "db_update_failed"
    UNKNOWN_ERROR = "unknown_error"


WAITING: Final = FailureReason.CONFLICT_EXISTING_SESSION
"""The failure of whoever waits for a busy doctor or patient: it is told every ten seconds, and mends itself."""


class SkipReason(StrEnum):
    """What happened to an appointment between its selection and its lock; or that it cannot start before it is due,
    which says nothing about whether it can then."""

    SESSION_ID_ALREADY_SET = "session_id_already_set"
    STATUS_CHANGED = "status_changed"
    NOT_DUE_YET = "not_due_yet"


class Cause(NamedTuple):
    reason: FailureReason
    message: str


CAUSES: Final[dict[str, Cause]] = {
    "unknown_modality": Cause(FailureReason.INVALID_APPOINTMENT_STATE, "The modality is none of text, voice, video."),
    "ends_before_start": Cause(
        FailureReason.INVALID_APPOINTMENT_STATE, "The appointment does not end after it starts."
    ),
    "patient_inactive": Cause(FailureReason.MISSING_DOCTOR_OR_PATIENT, "The patient is absent or inactive."),
    "doctor_inactive": Cause(FailureReason.MISSING_DOCTOR_OR_PATIENT, "The doctor is absent or inactive."),
    "no_subscription": Cause(FailureReason.MISSING_DOCTOR_OR_PATIENT, "The patient has no unexpired subscription."),
    "no_units": Cause(FailureReason.VALIDATION_FAILED, "The patient has no units of this modality remaining."),
    "party_busy": Cause(
        FailureReason.CONFLICT_EXISTING_SESSION,
        "The patient or the doctor already takes part in a live session.",
    ),
}
"""The rules of a new session, by the name the SQL of `statement.py` gives each."""

MAX_FAILURES: Final = 10
"""After so many failures an appointment is parked until an operator releases it."""
