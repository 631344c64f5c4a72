"""The whole matrix of decisions, compared with the promises."""

from itertools import islice

import pytest

from libs.guardrails import (
    OPERATIONS,
    AppointmentFacts,
    AppointmentRef,
    Claim,
    Facts,
    Flag,
    Flags,
    Reason,
    SessionFacts,
    SessionKind,
    SessionStatus,
    decide,
)
from tests.guardrails.promises import (
    ALL_FLAGS,
    APPOINTMENT,
    CALLERS,
    DOCTOR,
    PATIENT,
    PROMISES,
    SESSION,
    SUBJECTS,
    Case,
    cases,
    promised,
)


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
    surprises = (
        f"{case}: promised {promised(case)}, decided {decided(case)}"
        for case in cases(operation, subject)
        if decided(case) != promised(case)
    )
    assert not (first := list(islice(surprises, 5))), "\n".join(first)


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
    ended, live, booked = ("ended", False, False), ("active", False, False), ("CONFIRMED", False)
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


@pytest.mark.parametrize("flags", ALL_FLAGS)
def test_billing_by_appointment_hangs_on_the_flag_of_billing(flags: Flags) -> None:
    active, booked = ("active", False, True), ("IN_PROGRESS", False)
    case = Case("end_session", "appointment", "the patient", True, active, booked, flags)
    verdict = decide(case.claim(), case.facts(), flags)
    assert verdict.flag is Flag.ENFORCE_SESSION_GATED_BILLING
    enforced = flags.enforce_session_gated_billing
    assert (verdict.refusal if enforced else verdict.shadow) is Reason.SESSION_BILLING_REQUIRED
    assert (verdict.shadow if enforced else verdict.refusal) is None


WAITING = [
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
]


@pytest.mark.parametrize(("due_in", "parked", "retry_after"), WAITING)
def test_a_client_that_must_wait_is_told_how_long(due_in: float, parked: bool, retry_after: int) -> None:
    appointment = AppointmentFacts(APPOINTMENT, "CONFIRMED", PATIENT, DOCTOR, due_in=due_in, parked=parked)
    claim = Claim(OPERATIONS["send_message"], CALLERS["the patient"], AppointmentRef(APPOINTMENT))
    verdict = decide(claim, Facts(True, appointment), Flags())
    assert verdict.details == {"appointment_id": 12, "retry_after": retry_after}
    assert isinstance(verdict.details["retry_after"], int)
