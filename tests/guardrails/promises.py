"""What is promised of every decision, as a table.

Written from the promises to clients and not from the code: the rules are listed in the order in which refusals
are promised, and the first that applies is the answer. Whatever decides is compared with it: the pure function,
and the running API.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from libs.guardrails import (
    OPERATIONS,
    AppointmentFacts,
    AppointmentRef,
    Claim,
    Facts,
    Flag,
    Flags,
    Operation,
    Principal,
    Role,
    SessionFacts,
    SessionKind,
    SessionRef,
    SessionStatus,
)

TENANT = 1
PATIENT, DOCTOR, SOMEBODY_ELSE = 10, 20, 30
APPOINTMENT, SESSION = 12, 7


@dataclass(frozen=True)
class Promise:
    """What is promised of an operation: who may do it, in which states of the session, whether an appointment id may
    be tried at all, whether it concerns calls only, and whether the session's units must have begun to run."""

    operators: bool
    states: frozenset[str]
    by_appointment: bool
    calls_only: bool = False
    bills: bool = False
    charges: bool = False


LIVE = frozenset({"waiting", "connecting", "active"})
ANY = frozenset(SessionStatus)


PROMISES = {
    "send_message": Promise(operators=False, states=LIVE, by_appointment=True),
    "get_messages": Promise(operators=True, states=ANY, by_appointment=True),
    "reply_to_message": Promise(operators=False, states=LIVE, by_appointment=True),
    "add_reaction": Promise(operators=False, states=LIVE, by_appointment=True),
    "remove_reaction": Promise(operators=False, states=LIVE, by_appointment=True),
    "start_typing": Promise(operators=False, states=LIVE, by_appointment=True),
    "stop_typing": Promise(operators=False, states=LIVE, by_appointment=True),
    "mark_as_read": Promise(operators=False, states=ANY, by_appointment=True),
    "join": Promise(operators=False, states=LIVE, by_appointment=True),
    "view_session": Promise(operators=True, states=ANY, by_appointment=False),
    "complete_session": Promise(operators=True, states=ANY, by_appointment=False, bills=True),
    "deduct_interval": Promise(operators=True, states=LIVE, by_appointment=False, bills=True, charges=True),
    "view_billing": Promise(operators=True, states=ANY, by_appointment=False, bills=True),
    "ring": Promise(operators=False, states=LIVE, by_appointment=False, calls_only=True),
    "answer": Promise(operators=False, states=LIVE, by_appointment=False, calls_only=True),
    "connect": Promise(operators=False, states=LIVE, by_appointment=False, calls_only=True),
    "decline": Promise(
        operators=False, states=frozenset({"connecting", "declined"}), by_appointment=False, calls_only=True
    ),
    "end_session": Promise(operators=True, states=ANY, by_appointment=True, bills=True, charges=True),
    "process_payment": Promise(operators=True, states=ANY, by_appointment=True, bills=True, charges=True),
    "process_deduction": Promise(operators=True, states=ANY, by_appointment=True, bills=True, charges=True),
}

CALLERS = {
    "the patient": Principal(PATIENT, TENANT, Role.PATIENT),
    "the doctor": Principal(DOCTOR, TENANT, Role.DOCTOR),
    "an operator": Principal(SOMEBODY_ELSE, TENANT, Role.OPERATOR),
    "another patient": Principal(SOMEBODY_ELSE, TENANT, Role.PATIENT),
    "another doctor": Principal(SOMEBODY_ELSE, TENANT, Role.DOCTOR),
    "a patient with the doctor's id": Principal(DOCTOR, TENANT, Role.PATIENT),
    "a doctor with the patient's id": Principal(PATIENT, TENANT, Role.DOCTOR),
    "a service": Principal(SOMEBODY_ELSE, TENANT, Role.SERVICE),
    "a service with the patient's id": Principal(PATIENT, TENANT, Role.SERVICE),
}
TAKE_PART = {"the patient", "the doctor", "an operator"}

SUBJECTS: dict[str, SessionRef | AppointmentRef] = {
    "text session": SessionRef(SessionKind.TEXT, SESSION),
    "legacy spelling": SessionRef(SessionKind.TEXT, SESSION, legacy=True),
    "call session": SessionRef(SessionKind.CALL, SESSION),
    "appointment": AppointmentRef(APPOINTMENT),
}
TEXTS = {"text session", "legacy spelling"}

WILL_NEVER_HAVE_A_SESSION = {"CANCELLED", "EXPIRED", "COMPLETED", "NO_SHOW"}
APPOINTMENT_STATUSES = ("PENDING", "CONFIRMED", "RESCHEDULE_PROPOSED", *sorted(WILL_NEVER_HAVE_A_SESSION))
ALL_FLAGS = [Flags(*values) for values in product((False, True), repeat=4)]


@dataclass(frozen=True)
class Case:
    operation: str
    subject: str
    caller: str
    active: bool
    session: tuple[str, bool, bool] | None
    """Its status, whether it is overdue, and whether its units have begun to run."""
    appointment: tuple[str, bool] | None
    """Its status, and whether it is parked."""
    flags: Flags

    def claim(self) -> Claim[Operation]:
        return Claim(OPERATIONS[self.operation], CALLERS[self.caller], SUBJECTS[self.subject])

    def facts(self) -> Facts:
        session = appointment = None
        if self.session:
            status, overdue, begun = self.session
            kind = SessionKind.CALL if self.subject == "call session" else SessionKind.TEXT
            session = SessionFacts(
                SESSION,
                kind,
                SessionStatus(status),
                PATIENT,
                DOCTOR,
                APPOINTMENT,
                conversation_id=5,
                overdue=overdue,
                begun=begun,
            )
        if self.appointment:
            appointment_status, parked = self.appointment
            appointment = AppointmentFacts(APPOINTMENT, appointment_status, PATIENT, DOCTOR, due_in=90.0, parked=parked)
        return Facts(self.active, appointment, session)


def cases(operation: str, subject: str) -> Iterator[Case]:
    # Only billing asks whether the units have begun to run.
    begun = (False, True) if PROMISES[operation].bills else (False,)
    sessions = [None, *product([status.value for status in SessionStatus], (False, True), begun)]
    for caller, active, flags, session in product(CALLERS, (False, True), ALL_FLAGS, sessions):
        if subject != "appointment":
            yield Case(operation, subject, caller, active, session, None, flags)
            continue
        if session is None:
            yield Case(operation, subject, caller, active, None, None, flags)
        # An appointment is in progress only while it has a session.
        statuses = APPOINTMENT_STATUSES + (("IN_PROGRESS",) if session else ())
        for appointment in product(statuses, (False, True)):
            yield Case(operation, subject, caller, active, session, appointment, flags)


def promised(case: Case) -> tuple[str, Flag | None]:
    """The code of the refusal, or `allowed`, or `warned: ` and the code that enforcement would answer;
    and the flag on which that hung."""
    promise = PROMISES[case.operation]
    by_appointment = case.subject == "appointment"
    allow, lenient = Flag.ALLOW_LEGACY_APPOINTMENT_CHAT, case.flags.allow_legacy_appointment_chat
    enforce, enforced, required = (
        (Flag.ENFORCE_SESSION_GATED_BILLING, case.flags.enforce_session_gated_billing, "SESSION_BILLING_REQUIRED")
        if promise.bills
        else (Flag.ENFORCE_SESSION_GATED_CHAT, case.flags.enforce_session_gated_chat, "SESSION_CONTEXT_REQUIRED")
    )
    absent = case.appointment is None if by_appointment else case.session is None
    status, overdue, begun = case.session or (None, False, False)
    appointment_status = case.appointment[0] if case.appointment else None
    # Past its deadline, a session is expired.
    over = (SessionStatus.EXPIRED if overdue else status) not in promise.states
    unbegun = promise.charges and not begun
    rules: list[tuple[bool, str, Flag | None]] = [
        (not case.active, "UNAUTHENTICATED", None),
        (by_appointment and not promise.by_appointment, "SESSION_CONTEXT_INVALID", None),
        (case.subject in TEXTS and promise.calls_only, "SESSION_CONTEXT_INVALID", None),
        (absent and by_appointment, "APPOINTMENT_NOT_FOUND", None),
        (absent, "SESSION_NOT_FOUND", None),
        (case.caller not in TAKE_PART and by_appointment, "APPOINTMENT_NOT_FOUND", None),
        (case.caller not in TAKE_PART, "SESSION_NOT_FOUND", None),
        (case.caller == "an operator" and not promise.operators, "ROLE_NOT_ALLOWED", None),
        # By session context: no flag concerns it.
        (not by_appointment and over, "SESSION_NOT_ACTIVE", None),
        (not by_appointment and unbegun, "SESSION_NOT_CONNECTED", None),
        (not by_appointment, "allowed", None),
        # By appointment id, and it has a session: flags before state.
        (case.session is not None and enforced, required, enforce),
        (case.session is not None and over, "SESSION_NOT_ACTIVE", None),
        (case.session is not None and unbegun, "SESSION_NOT_CONNECTED", None),
        (case.session is not None, f"warned: {required}", enforce),
        # By appointment id, without a session.
        (promise.bills, "allowed", None),
        (appointment_status in WILL_NEVER_HAVE_A_SESSION, "SESSION_NOT_ACTIVE", None),
        (lenient and appointment_status == "CONFIRMED", "warned: SESSION_NOT_READY", allow),
        (appointment_status == "CONFIRMED", "SESSION_NOT_READY", allow),
        (True, "SESSION_NOT_READY", None),
    ]
    return next((answer, flag) for applies, answer, flag in rules if applies)
