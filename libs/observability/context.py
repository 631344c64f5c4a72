"""What belongs to a line of work: its correlation id and its trace, carried from process to process.

`bind` and `note` put fields on every log line written from here on. `carrier()` is what a row or a job
remembers of the work that made it; `continued(carrier)` takes it up again elsewhere.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final
from uuid import uuid4

from opentelemetry import trace

CORRELATION_ID: Final = "correlation_id"
CAUSATION_ID: Final = "causation_id"
TENANT_ID: Final = "tenant_id"
TRACEPARENT: Final = "traceparent"
CLIENT: Final = "client"

UNKNOWN_CLIENT: Final = "unknown"

_HEX = r"[0-9a-fA-F]"
_ACCEPTED = re.compile(rf"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}|{_HEX}{{32}}")

# The name of the first product of a User-Agent, if it is one that may be stored and counted.
_FAMILY = re.compile(r"([A-Za-z][A-Za-z0-9._+-]{0,39})(?:[/ ]|\Z)")

_fields: ContextVar[Mapping[str, Any]] = ContextVar("fields", default={})  # noqa: B039 (never changed in place)


def fields() -> Mapping[str, Any]:
    """What is bound here and now."""
    return _fields.get()


@contextmanager
def bind(**values: Any) -> Iterator[None]:
    """Binds fields for the length of the block."""
    token = _fields.set({**_fields.get(), **values})
    try:
        yield
    finally:
        _fields.reset(token)


def note(**values: Any) -> None:
    """Binds fields until the surrounding `bind` ends, so that whoever opened it sees them too."""
    _fields.set({**_fields.get(), **values})


def correlation_id() -> str | None:
    return _fields.get().get(CORRELATION_ID)


def new_correlation_id() -> str:
    return str(uuid4())


def accept_correlation_id(offered: str | None) -> str:
    """What the client offered if it is a UUID or 32 hex digits, else a new one."""
    return offered if offered and _ACCEPTED.fullmatch(offered) else new_correlation_id()


def client_family(user_agent: str) -> str:
    """Which program a client is, such as `okhttp` of `okhttp/4.12.0`: at most 40 harmless characters in lower
    case, or `unknown`."""
    match = _FAMILY.match(user_agent)
    return match[1].lower() if match else UNKNOWN_CLIENT


def client() -> str:
    """The family of the client that is being served."""
    family: str = _fields.get().get(CLIENT, UNKNOWN_CLIENT)
    return family


def carrier() -> dict[str, str]:
    """The present work as a small dict of strings, fit for a JSON column or a job."""
    bound = _fields.get()
    carried = {key: bound[key] for key in (CORRELATION_ID, CAUSATION_ID) if bound.get(key)}
    if (tenant_id := bound.get(TENANT_ID)) is not None:
        carried[TENANT_ID] = str(tenant_id)
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        carried[TRACEPARENT] = traceparent(context)
    return carried


def traceparent(context: trace.SpanContext) -> str:
    """A span as W3C Trace Context spells it."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


@contextmanager
def continued(carried: Mapping[str, str]) -> Iterator[None]:
    """Binds the ids of a carrier for the length of the block. The span is not: see `tracing.span`."""
    values: dict[str, Any] = {key: carried[key] for key in (CORRELATION_ID, CAUSATION_ID) if key in carried}
    if TENANT_ID in carried:
        values[TENANT_ID] = int(carried[TENANT_ID])
    with bind(**values):
        yield
