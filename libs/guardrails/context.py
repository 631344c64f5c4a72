"""From an identifier to a sealed session context.

`parse_context` reads what the client wrote, a `Claim` says what the caller wants to do with it, and
a `SessionContext` is the proof that the guard allowed exactly that. Only `Guard.open` can make one.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Generic, TypeVar, final

from libs.guardrails.operations import Operation, SessionStatus
from libs.guardrails.permissions import Principal
from libs.guardrails.reasons import Reason, Refused

MAX_ID: Final = 2**63 - 1

_ID = r"([1-9][0-9]{0,18})"
_CANONICAL = re.compile(rf"(text|call)_session:{_ID}", re.ASCII)
_LEGACY_TEXT = re.compile(rf"text_session_{_ID}", re.ASCII)
_APPOINTMENT = re.compile(_ID, re.ASCII)


class SessionKind(StrEnum):
    TEXT = "text"
    CALL = "call"


@dataclass(frozen=True, slots=True)
class SessionRef:
    """A session as addressed by a client; `legacy` when it used the old spelling."""

    kind: SessionKind
    id: int
    legacy: bool = False

    def __str__(self) -> str:
        return f"{self.kind}_session:{self.id}"


@dataclass(frozen=True, slots=True)
class AppointmentRef:
    """A plain appointment id: never permission by itself to start anything live."""

    id: int

    def __str__(self) -> str:
        return str(self.id)


def parse_context(text: str) -> SessionRef | AppointmentRef:
    """Reads `text_session:7`, `call_session:7`, the legacy `text_session_7`, or an appointment id.

    Raises `Refused(SESSION_CONTEXT_INVALID)` for everything else, without echoing it.
    """
    if match := _CANONICAL.fullmatch(text):
        ref: SessionRef | AppointmentRef = SessionRef(SessionKind(match[1]), int(match[2]))
    elif match := _LEGACY_TEXT.fullmatch(text):
        ref = SessionRef(SessionKind.TEXT, int(match[1]), legacy=True)
    elif match := _APPOINTMENT.fullmatch(text):
        ref = AppointmentRef(int(match[1]))
    else:
        raise Refused(Reason.SESSION_CONTEXT_INVALID)
    if ref.id > MAX_ID:
        raise Refused(Reason.SESSION_CONTEXT_INVALID)
    return ref


def addresses(operation: type[Operation], subject: SessionRef | AppointmentRef) -> bool:
    """Whether the operation can be asked for with such an identifier at all."""
    if isinstance(subject, AppointmentRef):
        return operation.by_appointment
    return subject.kind is SessionKind.CALL or not operation.calls_only


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What is known of a session at the moment of deciding; `overdue` when a deadline has passed
    that the stored status does not show yet, `begun` when its units have begun to run."""

    id: int
    kind: SessionKind
    status: SessionStatus
    patient_id: int
    doctor_id: int
    appointment_id: int | None
    conversation_id: int
    overdue: bool = False
    begun: bool = False

    @property
    def ref(self) -> SessionRef:
        return SessionRef(self.kind, self.id)


@dataclass(frozen=True, slots=True)
class AppointmentFacts:
    """What is known of an appointment; `due_in` is in seconds, negative once it is due."""

    id: int
    status: str
    patient_id: int
    doctor_id: int
    due_in: float
    parked: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a decision rests on. Rows of another tenant are not facts: they are absent."""

    caller_active: bool
    appointment: AppointmentFacts | None = None
    session: SessionFacts | None = None


Op = TypeVar("Op", bound=Operation, covariant=True)


@dataclass(frozen=True, slots=True)
class Claim(Generic[Op]):
    """Who wants to do what with which identifier. Nothing of it is believed yet."""

    operation: type[Op]
    caller: Principal
    subject: SessionRef | AppointmentRef


class _Seal:
    """Held by the guard alone; see `SessionContext`."""


SEAL: Final = _Seal()


@final
class SessionContext(Generic[Op]):
    """Permission to perform `Op`, once, now, on this session.

    A context never crosses a process: jobs carry ids, and whoever acts later asks the guard again.
    `session` is None only for chat by appointment id before the session exists, where a rollout
    flag still allows it; `appointment` is then set.
    """

    __slots__ = ("appointment", "caller", "operation", "session")

    def __init__(self, seal: _Seal, claim: Claim[Op], facts: Facts) -> None:
        if seal is not SEAL:
            raise TypeError("Only Guard.open makes a SessionContext.")
        self.operation = claim.operation
        self.caller = claim.caller
        self.session = facts.session
        self.appointment = facts.appointment

    def __init_subclass__(cls) -> None:
        # A subclass could leave out the check of the seal.
        raise TypeError("A SessionContext has no subclasses.")

    def __reduce__(self) -> str:
        raise TypeError("A SessionContext does not leave its process.")
