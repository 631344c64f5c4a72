import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from libs.guardrails import (
    OPERATIONS,
    AppointmentFacts,
    AppointmentRef,
    Claim,
    Facts,
    Family,
    Flag,
    Flags,
    Guard,
    Operation,
    Principal,
    Reason,
    Refused,
    Role,
    SessionContext,
    SessionFacts,
    SessionKind,
    SessionRef,
    SessionStatus,
    decide,
)
from libs.guardrails.operations import GetMessages, SendMessage
from libs.guardrails.testing import RecordingWitness, guard_with

PATIENT = Principal(10, 1, Role.PATIENT)
LIVE = SessionFacts(7, SessionKind.TEXT, SessionStatus.ACTIVE, 10, 20, 12, conversation_id=5)
ENDED = SessionFacts(7, SessionKind.TEXT, SessionStatus.ENDED, 10, 20, 12, conversation_id=5)
APPOINTMENT = AppointmentFacts(12, "CONFIRMED", 10, 20, due_in=90.0)
SEND = Claim(SendMessage, PATIENT, SessionRef(SessionKind.TEXT, 7))
SEND_BY_APPOINTMENT = Claim(SendMessage, PATIENT, AppointmentRef(12))


def test_an_open_context_says_who_may_do_what_where() -> None:
    context = guard_with().open(SEND, Facts(True, session=LIVE))
    assert (context.operation, context.caller, context.session, context.appointment) == (
        SendMessage,
        PATIENT,
        LIVE,
        None,
    )


def test_the_witness_is_told_once_of_every_verdict() -> None:
    witness = RecordingWitness()
    guard = guard_with(witness=witness)
    guard.open(SEND, Facts(True, session=LIVE))
    guard.open(SEND_BY_APPOINTMENT, Facts(True, APPOINTMENT, LIVE))
    for claim, facts in ((SEND, Facts(True, session=ENDED)), (SEND_BY_APPOINTMENT, Facts(True, APPOINTMENT))):
        with pytest.raises(Refused):
            guard.open(claim, facts)
    assert witness.verdicts == [
        ("send_message", "allowed", None),
        ("send_message", "warned", None),
        ("send_message", "refused", "SESSION_NOT_ACTIVE"),
        ("send_message", "refused", "SESSION_NOT_READY"),
    ]


@pytest.mark.parametrize("keep", [False, True])
def test_a_refusal_says_whether_the_rows_written_on_the_way_are_kept(keep: bool) -> None:
    with pytest.raises(Refused) as refused:
        guard_with().open(SEND, Facts(True, session=ENDED), keep=keep)
    assert refused.value.keep is keep


def test_a_refusal_keeps_no_rows_unless_told_to() -> None:
    with pytest.raises(Refused) as refused:
        guard_with().open(SEND, Facts(True, session=ENDED))
    assert refused.value.keep is False


def test_a_refusal_carries_the_reason_and_its_facts() -> None:
    with pytest.raises(Refused) as refused:
        guard_with().open(SEND_BY_APPOINTMENT, Facts(True, APPOINTMENT))
    assert refused.value.reason is Reason.SESSION_NOT_READY
    assert refused.value.facts == {"appointment_id": 12, "retry_after": 90}


@dataclass
class FlagsByTenant:
    flags: dict[int, Flags]
    asked: list[int] = field(default_factory=list)

    def for_tenant(self, tenant_id: int) -> Flags:
        self.asked.append(tenant_id)
        return self.flags[tenant_id]


def test_the_flags_are_those_of_the_callers_tenant() -> None:
    source = FlagsByTenant({1: Flags(), 2: Flags(enforce_session_gated_chat=True)})
    guard = Guard(source, RecordingWitness())
    guard.open(SEND_BY_APPOINTMENT, Facts(True, APPOINTMENT, LIVE))
    elsewhere = Claim(SendMessage, Principal(10, 2, Role.PATIENT), AppointmentRef(12))
    with pytest.raises(Refused) as refused:
        guard.open(elsewhere, Facts(True, APPOINTMENT, LIVE))
    assert refused.value.reason is Reason.SESSION_CONTEXT_REQUIRED
    assert source.asked == [1, 2]


def test_each_flag_is_read_by_its_own_name() -> None:
    for flag in Flag:
        flags = Flags(**{flag.value.lower(): True})
        assert {each for each in Flag if flags[each]} == {flag}


def test_all_flags_are_off_by_default() -> None:
    assert not any(Flags()[flag] for flag in Flag)


@pytest.fixture
def bill() -> Iterator[type[Operation]]:
    """An operation that bills by appointment id."""

    class Bill(Operation, name="bill", family=Family.BILLING, by_appointment=True):
        """Charge."""

    yield Bill
    del OPERATIONS["bill"]


def test_billing_by_appointment_id_hangs_on_the_billing_flag_alone(bill: type[Operation]) -> None:
    claim = Claim(bill, PATIENT, AppointmentRef(12))
    facts = Facts(True, APPOINTMENT, LIVE)
    others = {"enforce_session_gated_chat", "disable_legacy_appointment_triggers", "allow_legacy_appointment_chat"}
    for value in (False, True):
        rest = dict.fromkeys(others, value)
        warned = decide(claim, facts, Flags(enforce_session_gated_billing=False, **rest))
        refused = decide(claim, facts, Flags(enforce_session_gated_billing=True, **rest))
        assert (warned.word, warned.shadow) == ("warned", Reason.SESSION_BILLING_REQUIRED)
        assert refused.refusal is Reason.SESSION_BILLING_REQUIRED
        assert refused.details["session_context"] == "text_session:7"
        assert warned.flag is refused.flag is Flag.ENFORCE_SESSION_GATED_BILLING


@pytest.fixture
def context() -> SessionContext[SendMessage]:
    return guard_with().open(SEND, Facts(True, session=LIVE))


def test_a_context_cannot_be_made_without_the_seal() -> None:
    for seal in (None, object(), True, "SEAL"):
        with pytest.raises(TypeError, match="Only Guard"):
            SessionContext(seal, SEND, Facts(True, session=LIVE))  # type: ignore[arg-type]


def test_a_context_cannot_be_made_with_another_seal_of_the_same_kind() -> None:
    from libs.guardrails import context as module

    with pytest.raises(TypeError, match="Only Guard"):
        SessionContext(module._Seal(), SEND, Facts(True, session=LIVE))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_context_cannot_be_duplicated(context: SessionContext[SendMessage], duplicate: Any) -> None:
    with pytest.raises(TypeError):
        duplicate(context)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_context_cannot_be_pickled(context: SessionContext[SendMessage], protocol: int) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(context, protocol)


@pytest.mark.parametrize("base", [SessionContext, SessionContext[GetMessages]], ids=["bare", "of an operation"])
def test_a_context_cannot_be_forged_by_a_subclass(base: Any) -> None:
    with pytest.raises(TypeError, match="no subclasses"):

        class Forged(base):  # type: ignore[misc]
            def __init__(self) -> None:
                """Asks for no seal."""


def test_a_context_takes_no_further_attributes(context: SessionContext[SendMessage]) -> None:
    with pytest.raises(AttributeError):
        context.more = True  # type: ignore[attr-defined]
