"""The decision itself: a pure function of the claim, the facts and the flags."""

import math
from dataclasses import dataclass, field
from typing import Any

from libs.guardrails.context import AppointmentFacts, AppointmentRef, Claim, Facts, SessionFacts, addresses
from libs.guardrails.flags import Flag, Flags
from libs.guardrails.operations import Family, Operation, SessionStatus
from libs.guardrails.permissions import Principal, Role
from libs.guardrails.reasons import Reason

PARKED_RETRY_AFTER = 3600
"""Seconds a client should wait when the appointment needs an operator before it can start."""

# An appointment without a session in one of these states can still get one.
_CAN_STILL_START = frozenset({"PENDING", "CONFIRMED", "RESCHEDULE_PROPOSED"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a decision.

    `refusal` is None when the operation is allowed. `shadow` is what enforcement would have
    answered to a call that is allowed with a warning. `flag` is the one flag the outcome hung on,
    and `details` are the public fields of the problem body.
    """

    refusal: Reason | None = None
    shadow: Reason | None = None
    flag: Flag | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def word(self) -> str:
        if self.refusal:
            return "refused"
        return "warned" if self.shadow else "allowed"


def decide(claim: Claim[Operation], facts: Facts, flags: Flags) -> Verdict:
    """Judges a claim in the order in which refusals are promised: caller, identifier, existence and
    taking part, role, flags, state."""
    operation, caller = claim.operation, claim.caller
    by_appointment = isinstance(claim.subject, AppointmentRef)
    if not facts.caller_active:
        return Verdict(Reason.UNAUTHENTICATED)
    if not addresses(operation, claim.subject):
        return Verdict(Reason.SESSION_CONTEXT_INVALID)
    subject = facts.appointment if by_appointment else facts.session
    if subject is None or not _takes_part(caller, subject):
        return Verdict(Reason.APPOINTMENT_NOT_FOUND if by_appointment else Reason.SESSION_NOT_FOUND)
    if caller.role not in operation.roles:
        return Verdict(Reason.ROLE_NOT_ALLOWED)
    if isinstance(subject, SessionFacts):
        return _by_state(operation, subject)
    if facts.session is not None:
        return _with_session(operation, subject, facts.session, flags)
    return _without_session(operation, subject, flags)


def _takes_part(caller: Principal, subject: SessionFacts | AppointmentFacts) -> bool:
    match caller.role:
        case Role.PATIENT:
            return subject.patient_id == caller.user_id
        case Role.DOCTOR:
            return subject.doctor_id == caller.user_id
        case Role.OPERATOR:
            return True
        case Role.SERVICE:
            return False


def _by_state(operation: type[Operation], session: SessionFacts) -> Verdict:
    # Past its deadline a session is over, even in the moment before that is stored.
    status = SessionStatus.EXPIRED if session.overdue else session.status
    if status not in operation.passes:
        return Verdict(Reason.SESSION_NOT_ACTIVE)
    return Verdict(Reason.SESSION_NOT_CONNECTED) if operation.charges and not session.begun else Verdict()


def _with_session(
    operation: type[Operation], appointment: AppointmentFacts, session: SessionFacts, flags: Flags
) -> Verdict:
    """The appointment has a session: enforcement sends the client there, whatever its state."""
    if operation.family is Family.CHAT:
        flag, reason = Flag.ENFORCE_SESSION_GATED_CHAT, Reason.SESSION_CONTEXT_REQUIRED
    else:
        flag, reason = Flag.ENFORCE_SESSION_GATED_BILLING, Reason.SESSION_BILLING_REQUIRED
    if flags[flag]:
        details = {
            "appointment_id": appointment.id,
            "session_id": session.id,
            "session_context": str(session.ref),
        }
        return Verdict(reason, flag=flag, details=details)
    verdict = _by_state(operation, session)
    return verdict if verdict.refusal else Verdict(shadow=reason, flag=flag)


def _without_session(operation: type[Operation], appointment: AppointmentFacts, flags: Flags) -> Verdict:
    if operation.family is Family.BILLING:
        # The legacy way to be paid, for which a session was never needed; which states it knows is its own rule.
        return Verdict()
    if appointment.status not in _CAN_STILL_START:
        return Verdict(Reason.SESSION_NOT_ACTIVE)
    # Only a confirmed appointment will get a session by itself; before that, no flag lets anybody in.
    flag = Flag.ALLOW_LEGACY_APPOINTMENT_CHAT if appointment.status == "CONFIRMED" else None
    if flag and flags[flag]:
        return Verdict(shadow=Reason.SESSION_NOT_READY, flag=flag)
    wait = PARKED_RETRY_AFTER if appointment.parked else max(1, math.ceil(appointment.due_in))
    details = {"appointment_id": appointment.id, "retry_after": wait}
    return Verdict(Reason.SESSION_NOT_READY, flag=flag, details=details)
