"""How this product speaks: which log module each room belongs to, and what the guard's verdicts say."""

import time
from typing import Final

from libs.guardrails import (
    AppointmentRef,
    Claim,
    Facts,
    Family,
    Flags,
    Operation,
    Reason,
    SessionRef,
    Verdict,
    Witness,
)
from libs.observability.logging import Logger, get_logger
from libs.observability.registry import Metrics
from libs.observability.tracing import record_step

_MODULES: Final = {
    "appointments": "scheduling",
    "conversion": "scheduling",
    "legacy": "scheduling",
    "chat": "conversation",
    "realtime": "conversation",
    "sessions": "conversation",
    "guard": "conversation",
    "billing": "billing",
}


def module_of(component: str) -> str:
    """The log module that a room belongs to; rooms not named in the table belong to `infra`."""
    return _MODULES.get(component, "infra")


def logger(component: str) -> Logger:
    """The logger of a room."""
    return get_logger(component, module_of(component))


_log = logger("guard")

# The words that operators search for, by family: refused, and allowed with a warning.
_BLOCKED: Final = {
    Reason.SESSION_CONTEXT_REQUIRED: "SessionContextGuard: Chat operation blocked",
    Reason.SESSION_BILLING_REQUIRED: "SessionContextGuard: Billing blocked",
}
_ALLOWED: Final = {
    Family.CHAT: "SessionContextGuard: Chat operation allowed without session context",
    Family.BILLING: "SessionContextGuard: Billing allowed without session context",
}


class GuardTelemetry:
    """The guard's witness: counts each verdict, logs those that someone may want to find, and passes all of
    them on to other witnesses."""

    def __init__(self, metrics: Metrics, *others: Witness) -> None:
        self._metrics = metrics
        self._others = others

    def saw(self, claim: Claim[Operation], facts: Facts, flags: Flags, verdict: Verdict) -> None:
        began_ns = time.time_ns()
        operation = claim.operation
        metrics = self._metrics
        reason = verdict.refusal or verdict.shadow
        metrics.counter("guard_verdicts_total", operation.name, verdict.word, reason.code if reason else "none").inc()
        if operation.family is Family.CHAT:
            metrics.counter("chat_requests_total", operation.name).inc()
        if isinstance(claim.subject, SessionRef) and claim.subject.legacy:
            metrics.counter("legacy_identifier_total").inc()
        if verdict.refusal is Reason.SESSION_CONTEXT_REQUIRED:
            metrics.counter("chat_blocked_session_context_required_total", operation.name).inc()
        elif verdict.refusal is Reason.SESSION_BILLING_REQUIRED:
            metrics.counter("billing_blocked_session_context_required_total", operation.name).inc()
        if verdict.refusal or verdict.shadow:
            self._tell(claim, facts, flags, verdict)
        for other in self._others:
            other.saw(claim, facts, flags, verdict)
        told = {"operation": operation.name, "verdict": verdict.word} | ({"reason": reason.code} if reason else {})
        record_step("guard.decide", start_ns=began_ns, end_ns=time.time_ns(), attributes=told)

    def _tell(self, claim: Claim[Operation], facts: Facts, flags: Flags, verdict: Verdict) -> None:
        operation = claim.operation
        subject = claim.subject
        told = {
            "appointment_id": subject.id if isinstance(subject, AppointmentRef) else None,
            "session_id": facts.session.id if facts.session else None,
            "user_id": claim.caller.user_id,
            "enforced": flags[verdict.flag] if verdict.flag else None,
            "operation": operation.name,
        }
        if operation.family is Family.BILLING:
            told["endpoint"] = operation.name
        if verdict.refusal is None:
            _log.warning("guard_allowed_with_warning", message=_ALLOWED[operation.family], **told)
        elif message := _BLOCKED.get(verdict.refusal):
            _log.warning("guard_blocked", message=message, **told)
        else:
            _log.info("guard_refused", error_code=verdict.refusal.code, **told)
