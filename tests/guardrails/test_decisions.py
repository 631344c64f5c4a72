"""The whole matrix of decisions, compared with the promises as a table.

The table below is written from the promises to clients and not from the code: the rules are listed in
the order in which refusals are promised, and the first that applies is the answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest

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
    decide,
)

TENANT = 1
PATIENT, DOCTOR, SOMEBODY_ELSE = 10, 20, 30
APPOINTMENT, SESSION = 12, 7


@dataclass(frozen=True)
class Promise:
    """What is promised of an operation: who may do it, whether the session must be live, and whether an
    appointment id may be tried at all."""

    operators: bool
    needs_live: bool
    by_appointment: bool


PROMISES = {
    "send_message": Promise(operators=False, needs_live=True, by_appointment=True),
    "get_messages": Promise(operators=True, needs_live=False, by_appointment=True),
    "reply_to_message": Promise(operators=False, needs_live=True, by_appointment=True),
    "add_reaction": Promise(operators=False, needs_live=True, by_appointment=True),
    "remove_reaction": Promise(operators=False, needs_live=True, by_appointment=True),
    "start_typing": Promise(operators=False, needs_live=True, by_appointment=True),
    "stop_typing": Promise(operators=False, needs_live=True, by_appointment=True),
    "mark_as_read": Promise(operators=False, needs_live=False, by_appointment=True),
    "join": Promise(operators=False, needs_live=True, by_appointment=True),
    "view_session": Promise(operators=True, needs_live=False, by_appointment=False),
    "complete_session": Promise(operators=True, needs_live=False, by_appointment=False),
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

LIVE = {"waiting", "connecting", "active"}
WILL_NEVER_HAVE_A_SESSION = {"CANCELLED", "EXPIRED", "COMPLETED", "NO_SHOW"}
APPOINTMENT_STATUSES = ("PENDING", "CONFIRMED", "RESCHEDULE_PROPOSED", *sorted(WILL_NEVER_HAVE_A_SESSION))
ALL_FLAGS = [Flags(*values) for values in product((False, True), repeat=4)]


@dataclass(frozen=True)
class Case:
    operation: str
    subject: str
    caller: str
    active: bool
    session: tuple[str, bool] | None
    """Its status, and whether it is overdue."""
    appointment: tuple[str, bool] | None
    """Its status, and whether it is parked."""
    flags: Flags

    def claim(self) -> Claim[Operation]:
        return Claim(OPERATIONS[self.operation], CALLERS[self.caller], SUBJECTS[self.subject])

    def facts(self) -> Facts:
        session = appointment = None
        if self.session:
            status, overdue = self.session
            kind = SessionKind.CALL if self.subject == "call session" else SessionKind.TEXT
            session = SessionFacts(
                SESSION, kind, SessionStatus(status), PATIENT, DOCTOR, APPOINTMENT, conversation_id=5, overdue=overdue
            )
        if self.appointment:
            appointment_status, parked = self.appointment
            appointment = AppointmentFacts(APPOINTMENT, appointment_status, PATIENT, DOCTOR, due_in=90.0, parked=parked)
        return Facts(self.active, appointment, session)


def cases(operation: str, subject: str) -> Iterator[Case]:
    sessions = [None, *product([status.value for status in SessionStatus], (False, True))]
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
    enforce, allow = Flag.ENFORCE_SESSION_GATED_CHAT, Flag.ALLOW_LEGACY_APPOINTMENT_CHAT
    enforced, lenient = case.flags.enforce_session_gated_chat, case.flags.allow_legacy_appointment_chat
    absent = case.appointment is None if by_appointment else case.session is None
    status, overdue = case.session or (None, False)
    appointment_status = case.appointment[0] if case.appointment else None
    over = promise.needs_live and (status not in LIVE or overdue)
    rules: list[tuple[bool, str, Flag | None]] = [
        (not case.active, "UNAUTHENTICATED", None),
        (by_appointment and not promise.by_appointment, "SESSION_CONTEXT_INVALID", None),
        (absent and by_appointment, "APPOINTMENT_NOT_FOUND", None),
        (absent, "SESSION_NOT_FOUND", None),
        (case.caller not in TAKE_PART and by_appointment, "APPOINTMENT_NOT_FOUND", None),
        (case.caller not in TAKE_PART, "SESSION_NOT_FOUND", None),
        (case.caller == "an operator" and not promise.operators, "ROLE_NOT_ALLOWED", None),
        # By session context: no flag concerns it.
        (not by_appointment and over, "SESSION_NOT_ACTIVE", None),
        (not by_appointment, "allowed", None),
        # By appointment id, and it has a session: flags before state.
        (case.session is not None and enforced, "SESSION_CONTEXT_REQUIRED", enforce),
        (case.session is not None and over, "SESSION_NOT_ACTIVE", None),
        (case.session is not None, "warned: SESSION_CONTEXT_REQUIRED", enforce),
        # By appointment id, without a session.
        (appointment_status in WILL_NEVER_HAVE_A_SESSION, "SESSION_NOT_ACTIVE", None),
        (lenient and appointment_status == "CONFIRMED", "warned: SESSION_NOT_READY", allow),
        (appointment_status == "CONFIRMED", "SESSION_NOT_READY", allow),
        (True, "SESSION_NOT_READY", None),
    ]
    return next((answer, flag) for applies, answer, flag in rules if applies)


def decided(case: Case) -> tuple[str, Flag | None]:
    verdict = decide(case.claim(), case.facts(), case.flags)
    if verdict.refusal:
        assert verdict.word == "refused"
        assert verdict.shadow is None
        return verdict.refusal.code, verdict.flag
    if verdict.shadow:
        assert verdict.word == "warned"
        return f"warned: {verdict.shadow.code}", verdict.flag
    assert verdict.word == "allowed"
    return "allowed", verdict.flag


def test_the_table_of_promises_names_every_operation() -> None:
    assert PROMISES.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("operation", PROMISES)
def test_every_decision_is_the_promised_one(operation: str, subject: str) -> None:
    surprises = [
        f"{case}: promised {promised(case)}, decided {decided(case)}"
        for case in cases(operation, subject)
        if decided(case) != promised(case)
    ]
    assert not surprises, "\n".join([f"{len(surprises)} surprises", *surprises[:5]])


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("operation", PROMISES)
def test_what_the_client_does_next_can_be_written_from_the_facts_of_the_refusal(operation: str, subject: str) -> None:
    for case in cases(operation, subject):
        verdict = decide(case.claim(), case.facts(), case.flags)
        if verdict.refusal and verdict.refusal.next_action:
            verdict.refusal.next_action[1].format_map(verdict.details)
        else:
            assert not verdict.details, "Only refusals that lead somewhere tell facts."


def test_refusals_come_in_the_promised_order() -> None:
    """Everything is wrong at first; mending the first fault uncovers the next one."""
    on, off = Flags(enforce_session_gated_chat=True), Flags()
    ended, live, booked = ("ended", False), ("active", False), ("CONFIRMED", False)
    view, send, appointment = "view_session", "send_message", "appointment"
    steps = [
        (Case(view, appointment, "another patient", False, None, None, on), "UNAUTHENTICATED"),
        (Case(view, appointment, "another patient", True, None, None, on), "SESSION_CONTEXT_INVALID"),
        (Case(send, appointment, "another patient", True, None, None, on), "APPOINTMENT_NOT_FOUND"),
        (Case(send, appointment, "another patient", True, ended, booked, on), "APPOINTMENT_NOT_FOUND"),
        (Case(send, appointment, "an operator", True, ended, booked, on), "ROLE_NOT_ALLOWED"),
        (Case(send, appointment, "the patient", True, ended, booked, on), "SESSION_CONTEXT_REQUIRED"),
        (Case(send, appointment, "the patient", True, ended, booked, off), "SESSION_NOT_ACTIVE"),
        (Case(send, appointment, "the patient", True, live, booked, off), "warned: SESSION_CONTEXT_REQUIRED"),
    ]
    assert [decided(case)[0] for case, _ in steps] == [answer for _, answer in steps]


def test_a_client_that_must_use_the_session_is_told_which() -> None:
    flags = Flags(enforce_session_gated_chat=True)
    for kind, context in ((SessionKind.TEXT, "text_session:7"), (SessionKind.CALL, "call_session:7")):
        session = SessionFacts(SESSION, kind, SessionStatus.ACTIVE, PATIENT, DOCTOR, APPOINTMENT, conversation_id=5)
        appointment = AppointmentFacts(APPOINTMENT, "IN_PROGRESS", PATIENT, DOCTOR, due_in=-60.0)
        claim = Claim(OPERATIONS["send_message"], CALLERS["the patient"], AppointmentRef(APPOINTMENT))
        verdict = decide(claim, Facts(True, appointment, session), flags)
        assert verdict.details == {"appointment_id": 12, "session_id": 7, "session_context": context}


@pytest.mark.parametrize(
    ("due_in", "parked", "retry_after"),
    [
        (90.0, False, 90),
        (89.01, False, 90),
        (1.5, False, 2),
        (1.0, False, 1),
        (0.2, False, 1),
        (0.0, False, 1),
        (-0.5, False, 1),
        (-86_400.0, False, 1),
        (90.0, True, 3600),
        (-60.0, True, 3600),
    ],
)
def test_a_client_that_must_wait_is_told_how_long(due_in: float, parked: bool, retry_after: int) -> None:
    appointment = AppointmentFacts(APPOINTMENT, "CONFIRMED", PATIENT, DOCTOR, due_in=due_in, parked=parked)
    claim = Claim(OPERATIONS["send_message"], CALLERS["the patient"], AppointmentRef(APPOINTMENT))
    verdict = decide(claim, Facts(True, appointment), Flags())
    assert verdict.details == {"appointment_id": 12, "retry_after": retry_after}
    assert isinstance(verdict.details["retry_after"], int)
