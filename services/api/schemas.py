"""Types that several rooms share: what the API accepts and what every answer looks like."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Generic, TypeVar

from fastapi import Path, Query
from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from libs.domain.pages import Page
from libs.guardrails import Reason
from libs.guardrails.context import MAX_ID
from services.api.errors import MEDIA_TYPE, STATUS

T = TypeVar("T")


class In(BaseModel):
    """A request body: fields that are not declared are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Empty(In):
    """The body of a request whose address says everything."""


class Out(BaseModel):
    """A response body, read from an object of the domain."""

    model_config = ConfigDict(from_attributes=True)


def _storable(text: str) -> str:
    # Python's strings and JSON's escapes know both; PostgreSQL knows neither.
    if "\x00" in text:
        raise PydanticCustomError("nul", "Must not contain the NUL character.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "Must not contain half of a surrogate pair.") from None
    return text


# Pydantic also reads numbers, even in quotes, as seconds since 1970.
_DATE_AND_TIME: Final = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}", re.ASCII)


def _only_text(value: Any) -> Any:
    if not (isinstance(value, str) and _DATE_AND_TIME.match(value)):
        raise PydanticCustomError("timestamp", "Must be an RFC 3339 timestamp with an offset.")
    return value


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("timestamp", "Must be a moment between the years 1 and 9999 in UTC.") from None


# Pydantic also reads signs, spaces, underscores and fractions of nothing.
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,18}")


def _only_digits(value: Any) -> Any:
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        raise PydanticCustomError("decimal", "Must be a whole number, written in plain digits.")
    return value


Storable = AfterValidator(_storable)
SafeStr = Annotated[str, Storable]
Id = Annotated[int, Field(strict=True, ge=1, le=MAX_ID)]
Count = Annotated[int, Field(strict=True, ge=0, le=1_000_000)]
Timestamp = Annotated[AwareDatetime, BeforeValidator(_only_text), AfterValidator(_in_utc)]

Digits = BeforeValidator(_only_digits)
"""For numbers in paths and queries: each is spelled in one way."""

IdPath = Annotated[int, Path(ge=1, le=MAX_ID), Digits]
Cursor = Annotated[int | None, Query(ge=1, le=MAX_ID, description="`next_cursor` of the page before."), Digits]
Limit = Annotated[int, Query(ge=1, le=100), Digits]
DEFAULT_LIMIT = 50


class PageOut(Out, Generic[T]):
    """One page, newest first; pass `next_cursor` as `cursor` to get the next."""

    items: list[T]
    next_cursor: str | None
    has_more: bool


def page_out(page: Page[Any], read: Callable[[Any], T]) -> PageOut[T]:
    cursor = None if page.next_cursor is None else str(page.next_cursor)
    return PageOut(items=[read(item) for item in page.items], next_cursor=cursor, has_more=page.has_more)


class NextAction(BaseModel):
    method: str
    href: str


class FieldError(BaseModel):
    """`pointer` is a JSON pointer into the part of the request that `in` names."""

    pointer: str
    detail: str


class Problem(BaseModel):
    """Every refusal, as `application/problem+json` (RFC 9457)."""

    type: str = Field(examples=["/problems/SESSION_NOT_READY"])
    title: str
    status: int
    detail: str
    instance: str
    code: str
    correlation_id: str
    appointment_id: int | None = None
    session_id: int | None = None
    session_context: str | None = None
    retry_after: int | None = Field(None, description="Seconds to wait; also in the header `Retry-After`.")
    next_action: NextAction | None = None
    errors: list[FieldError] | None = None


_ALWAYS = (
    Reason.UNAUTHENTICATED,
    Reason.ROLE_NOT_ALLOWED,
    Reason.REQUEST_TIMEOUT,
    Reason.PAYLOAD_TOO_LARGE,
    Reason.VALIDATION_FAILED,
    Reason.OVERLOADED,
)


OF_ANY_IDENTIFIER: Final = (
    Reason.SESSION_CONTEXT_INVALID,
    Reason.SESSION_CONTEXT_REQUIRED,
    Reason.SESSION_NOT_READY,
    Reason.SESSION_NOT_FOUND,
    Reason.APPOINTMENT_NOT_FOUND,
    Reason.SESSION_NOT_ACTIVE,
)
"""How an identifier can be refused where an appointment id may be tried."""


def refusals(*reasons: Reason) -> dict[int | str, dict[str, Any]]:
    """The documented refusals of a guarded route, besides those that every one has."""
    # What cannot even be read as JSON has a status of its own.
    unreadable = (400, Reason.VALIDATION_FAILED)
    return documented(unreadable, *((STATUS[reason.kind], reason) for reason in (*_ALWAYS, *reasons)))


def creating(*reasons: Reason) -> dict[int | str, dict[str, Any]]:
    """The documented refusals of a guarded route that creates or charges something, and so takes an idempotency key."""
    return refusals(*reasons, Reason.IDEMPOTENCY_IN_FLIGHT, Reason.IDEMPOTENCY_KEY_REUSED)


def documented(*refusals: tuple[int, Reason]) -> dict[int | str, dict[str, Any]]:
    """The documentation of these refusals and no others."""
    by_status: dict[int, list[Reason]] = {}
    for status, reason in refusals:
        by_status.setdefault(status, []).append(reason)
    return {
        status: {
            "model": Problem,
            "description": " ".join(f"`{reason.code}`: {reason.title}." for reason in listed),
            "content": {MEDIA_TYPE: {}},
        }
        for status, listed in sorted(by_status.items())
    }
