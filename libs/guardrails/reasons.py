"""Every way in which a request is refused: code, kind, sentence, and what the client does next.

A reason is data. Its status, body, label and retry hint follow from the row here; nothing else
decides them. Codes are a contract with clients: add, never rename.
"""

from enum import Enum
from typing import Any


class Kind(Enum):
    """What sort of refusal it is; `services.api.errors` maps each kind to one HTTP status."""

    UNAUTHENTICATED = "unauthenticated"
    BAD_REQUEST = "bad_request"
    INVALID = "invalid"
    PAYMENT_REQUIRED = "payment_required"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    INTERNAL = "internal"


class Reason(Enum):
    """One refusal: `code` for machines, `title` for people, `help` for the page `/problems/{code}`.

    `next_action` is the method and address that get the client further; the address is a template
    filled from the facts of the refusal.
    """

    kind: Kind
    title: str
    help: str
    next_action: tuple[str, str] | None

    def __new__(
        cls,
        code: str,
        kind: Kind,
        title: str,
        help: str,  # noqa: A002
        next_action: tuple[str, str] | None = None,
    ) -> "Reason":
        member = object.__new__(cls)
        member._value_ = code
        member.kind = kind
        member.title = title
        member.help = help
        member.next_action = next_action
        return member

    @property
    def code(self) -> str:
        return str(self.value)

    UNAUTHENTICATED = (
        "UNAUTHENTICATED",
        Kind.UNAUTHENTICATED,
        "Sign in first",
        "The request carries no token, or one that is malformed, expired, signed with another key, or of a "
        "user who is no longer active. Obtain a fresh token and repeat the request.",
    )
    SESSION_CONTEXT_INVALID = (
        "SESSION_CONTEXT_INVALID",
        Kind.BAD_REQUEST,
        "Not a session context",
        "The identifier is neither text_session:{id} nor call_session:{id}, nor an appointment id where one "
        "is allowed. Ask GET /api/v1/appointments/{id}/session for the right one.",
    )
    SESSION_NOT_FOUND = (
        "SESSION_NOT_FOUND",
        Kind.NOT_FOUND,
        # Someone else's session looks exactly like one that was never there.
        "No such session",
        "No session with this context exists among those the caller takes part in.",
    )
    APPOINTMENT_NOT_FOUND = (
        "APPOINTMENT_NOT_FOUND",
        Kind.NOT_FOUND,
        "No such appointment",
        "No appointment with this id exists among those the caller takes part in.",
    )
    MESSAGE_NOT_FOUND = (
        "MESSAGE_NOT_FOUND",
        Kind.NOT_FOUND,
        "No such message",
        "The conversation has no message with this id.",
    )
    ROLE_NOT_ALLOWED = (
        "ROLE_NOT_ALLOWED",
        Kind.FORBIDDEN,
        "Your role may not do this",
        "The caller is known but the operation belongs to another role. The documentation of each operation "
        "says who may call it.",
    )
    ORIGIN_NOT_ALLOWED = (
        "ORIGIN_NOT_ALLOWED",
        Kind.FORBIDDEN,
        "Not from this page",
        "A web page of this origin may not open sockets. Whoever operates the service lists the origins that may.",
    )
    SESSION_CONTEXT_REQUIRED = (
        "SESSION_CONTEXT_REQUIRED",
        Kind.BAD_REQUEST,
        "Use the session context",
        "The appointment already has a session, and live operations must address that session. Repeat the "
        "request with the session_context given in the body.",
        ("GET", "/api/v1/appointments/{appointment_id}/session"),
    )
    SESSION_NOT_READY = (
        "SESSION_NOT_READY",
        Kind.FORBIDDEN,
        "The session has not started yet",
        "The appointment has no session yet. Wait retry_after seconds and poll "
        "GET /api/v1/appointments/{id}/session until it names a session_context.",
        ("GET", "/api/v1/appointments/{appointment_id}/session"),
    )
    SESSION_BILLING_REQUIRED = (
        "SESSION_BILLING_REQUIRED",
        Kind.BAD_REQUEST,
        "Bill the session, not the appointment",
        "The appointment has a session, so it is billed through that session. "
        "Call POST /api/v1/sessions/{context}/end with the session_context given in the body.",
        ("POST", "/api/v1/sessions/{session_context}/end"),
    )
    SESSION_NOT_ACTIVE = (
        "SESSION_NOT_ACTIVE",
        Kind.CONFLICT,
        "The session is not live",
        "The session has ended, expired, was missed or declined, or the appointment can no longer get one. "
        "Its history stays readable; nothing live can happen in it again.",
    )
    SESSION_NOT_CONNECTED = (
        "SESSION_NOT_CONNECTED",
        Kind.CONFLICT,
        "The session never connected",
        "A call that never connected, or a text session that was never activated, cannot be billed.",
    )
    SESSION_CONFLICT = (
        "SESSION_CONFLICT",
        Kind.CONFLICT,
        "A party is not free",
        "The patient or the doctor takes part in another live session, which has to end first, or the doctor has an "
        "appointment within ten minutes.",
    )
    NO_SESSIONS_REMAINING = (
        "NO_SESSIONS_REMAINING",
        Kind.PAYMENT_REQUIRED,
        "No sessions remaining",
        "The patient has no unexpired subscription with units left for this modality.",
    )
    NOTHING_TO_REFUND = (
        "NOTHING_TO_REFUND",
        Kind.CONFLICT,
        "Nothing to refund",
        "Nothing was charged for this, or all of it was refunded before.",
    )
    SLOT_TAKEN = (
        "SLOT_TAKEN",
        Kind.CONFLICT,
        "The slot is taken",
        "The doctor already has an appointment that overlaps this time. Choose another one.",
    )
    INVALID_TRANSITION = (
        "INVALID_TRANSITION",
        Kind.CONFLICT,
        "Not possible in this state",
        "The present status of the appointment, or of the session, does not allow this change. "
        "The detail names both states.",
    )
    IDEMPOTENCY_CONFLICT = (
        "IDEMPOTENCY_CONFLICT",
        Kind.CONFLICT,
        "The id was used for another message",
        "A message with this client_message_id but another body is stored. Use a new id for a new message.",
    )
    IDEMPOTENCY_KEY_REUSED = (
        "IDEMPOTENCY_KEY_REUSED",
        Kind.INVALID,
        "The key belongs to another request",
        "An earlier request had this Idempotency-Key and was a different one. Use a new key for a new request.",
    )
    IDEMPOTENCY_IN_FLIGHT = (
        "IDEMPOTENCY_IN_FLIGHT",
        Kind.CONFLICT,
        "The same request is being processed",
        "A request with this Idempotency-Key has not been answered yet. Repeat yours in retry_after seconds.",
    )
    VALIDATION_FAILED = (
        "VALIDATION_FAILED",
        Kind.INVALID,
        "The request is not valid",
        "The body, a parameter or the JSON itself is not what the operation accepts. "
        "errors[] points to each fault; the status is 400 when the JSON cannot be read and 422 otherwise.",
    )
    NOT_FOUND = (
        "NOT_FOUND",
        Kind.NOT_FOUND,
        "Nothing here",
        "The address does not exist.",
    )
    METHOD_NOT_ALLOWED = (
        "METHOD_NOT_ALLOWED",
        Kind.METHOD_NOT_ALLOWED,
        "Method not allowed",
        "The address exists but does not answer this method. The Allow header lists those it answers.",
    )
    REQUEST_TIMEOUT = (
        "REQUEST_TIMEOUT",
        Kind.TIMEOUT,
        "The request arrived too slowly",
        "The body did not arrive in full within the time allowed. Nothing was stored; repeat the request.",
    )
    PAYLOAD_TOO_LARGE = (
        "PAYLOAD_TOO_LARGE",
        Kind.TOO_LARGE,
        "The body is too large",
        "The body is longer than this service accepts, which is 64 KiB unless configured otherwise.",
    )
    RATE_LIMITED = (
        "RATE_LIMITED",
        Kind.RATE_LIMITED,
        "Too many requests",
        "Wait retry_after seconds and repeat the request.",
    )
    OVERLOADED = (
        "OVERLOADED",
        Kind.OVERLOADED,
        "Try again in a moment",
        "The service or its database is momentarily out of capacity. Nothing was stored; repeat the request "
        "after retry_after seconds.",
    )
    INTERNAL_ERROR = (
        "INTERNAL_ERROR",
        Kind.INTERNAL,
        "Something went wrong on our side",
        "The fault was logged under the correlation_id of the body. Quote it when you report the problem.",
    )


class Refused(Exception):
    """Raised to refuse a request; rolls the transaction back unless `keep` is true.

    `facts` are the public fields of the problem body (`appointment_id`, `session_context`,
    `retry_after` in seconds, `errors`, …) and must never hold the client's own input. `status`
    replaces the kind's HTTP status for the one reason that has two (`VALIDATION_FAILED`).
    """

    def __init__(
        self,
        reason: Reason,
        detail: str | None = None,
        *,
        keep: bool = False,
        status: int | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(reason.code)
        self.reason = reason
        self.detail = detail
        self.keep = keep
        self.status = status
        self.facts = facts
