"""One engine that masks personal data and secrets, for log lines and for exported spans alike.

What a field is called decides first (`token`, `phone`, `body`, `url`, …). Whatever is left is free text, in
which e-mail addresses, phone numbers and credentials are masked wherever they stand. Ids belong in
fields of their own: in free text, long numbers look like phone numbers and are masked too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal
from urllib.parse import unquote

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Status

Masked = Literal["email", "phone", "body", "secret", "name"]
Rule = Literal["secret", "name", "phone", "body", "address", "number", "text"]

REDACTED: Final = "[redacted]"
TEXT_LIMIT: Final = 8192
PREVIEW: Final = 50
"""Characters of a message body that are shown where the configuration asks for it."""

OURS: Final = frozenset(
    {"timestamp", "level", "event", "category", "component", "module", "service", "version", "trace_id", "span_id"}
    | {"method", "route", "operation"}
)
"""Fields that only the program itself fills, with constants and ids of its own: never masked."""

_IDS: Final = frozenset(
    {"correlation_id", "causation_id", "connection_id", "event_id", "fingerprint", "stack_fingerprint"}
)
# Too long for a telephone number, or of the shape that only the program itself gives them.
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|(?:[0-9a-f]{16}){1,2}", re.IGNORECASE)

_SECRET_KEY = re.compile(
    r"token|secret|passw|authorization|cookie|api_?key|private_key|signature|credential"
    r"|(^|_)(pwd|jwt|card|cvc|cvv|pin|otp)(_|$)"
)
_NAME_KEY = re.compile(
    r"name|(?!(server|client|network_peer)_address\Z)(.*_)?((first|middle|last|full|given|family|patient|doctor|display|user|caller|customer|contact)_?name"
    r"|address|street|dob|date_of_birth|birth_?(day|date))"
)
_PHONE_KEY = re.compile(
    r"(.*_)?(phone|phone_number|msisdn|mobile|tel)|to|from|caller|caller_id|callee|to_number|from_number"
)
_BODY_KEY = re.compile(r"(.*_)?(body|text|content|transcript)")
_ADDRESS_KEY = re.compile(r"(.*_)?(url|uri)|url_(full|path|query)|http_target")
_NUMBER_KEY = re.compile(r"(.*_)?(ids?|ms|seconds|count|total|bytes|at|seq|status|port|attempts|level|rate)|timestamp")

_ORIGIN = re.compile(r"(?:[a-z][a-z0-9+.-]*://[^/?#]*)?", re.IGNORECASE)
_ESCAPED_AT = re.compile(r"%(?:25)*40", re.IGNORECASE)
_ESCAPES = re.compile(r"(?:%(?:25)*[0-9a-f]{2})+", re.IGNORECASE)
_ESCAPED_PERCENT = re.compile(r"%(?:25)+(?=[0-9a-f]{2})", re.IGNORECASE)
# Searched for in case-folded text, which takes a third of the time that ignoring case does. Two letters are an i to
# whoever ignores case and none when folded: \u0131, and \u0130, of which \u0307 is left.
_SUSPECT = re.compile(r"[@\d\u0131\u0307]|bearer|basic|eyj|://|passw|secret|token|api[_-]?key|cookie|whsec_|ticket\.")
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LOCAL = r"[\w.!#$%&'*+=^`{|}~-]"
# Possessive, and only from a boundary: the search stays linear whatever it is given.
_EMAIL = re.compile(rf"(?P<email>(?<!{_LOCAL}){_LOCAL}++@[\w-]++(?:\.[\w-]++)*+)")
_FREE_TEXT = re.compile(
    # Credentials, wherever they are quoted.
    r"(?P<secret>\bbearer\s+[^\s\"']+|\bbasic\s+(?-i:(?=[\w+/]*[A-Z0-9=])[\w+/]{6,}=*)|\b(?-i:eyJ)[\w-]+(?:\.[\w-]+)*|(?<=://)[^\s:/@]*:[^\s/]+(?=@)"
    r"|\b[\w-]*(?:passw(?:or)?d|secret|token|api[_-]?key)[\"']?\s?[=:]\s?[\"']?[^\s\"'&,;]+"
    r"|\bcookie[\"']?\s?[=:]\s?[\"']?[^\s\"',;]+(?:;\s?[^\s\"',;=]+=[^\s\"',;]+)*"
    r"|\b(?:whsec_|ticket\.)[\w+/=-]{16,})"
    # Digits that are not a phone number: UUID, moment, IPv4 address, hash or provider id.
    r"|(?P<keep>"
    r"(?<![0-9a-f])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![0-9a-f])"
    r"|(?<!\d)(?:19|20)\d\d-(?:0\d|1[0-2])-(?:[0-2]\d|3[01])(?!\d)"
    r"(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"
    rf"|(?<![\d.+])(?:{_OCTET}\.){{3}}{_OCTET}(?![\d.])"
    r"|(?<!\w)[a-z]{0,2}(?=[0-9a-f]*\d[a-f])[0-9a-f]{16,64}(?!\w)"
    r")"
    rf"|{_EMAIL.pattern}"
    r"|(?P<phone>(?<!\d)(?:\+\s?)?\(?\d(?:[\s()+.\-/\u2010-\u2015\u2212]{0,4}+\d){7,}+)",
    re.IGNORECASE,
)
# What may reach across a cut and still be recognised.
_OVERLAP: Final = 512


def scrub_text(text: str) -> str:
    """`text` without e-mail addresses, phone numbers and credentials, cut at 8 KiB."""
    return Redactor().text(text)


def scrub_error(error: BaseException) -> str:
    """What an exception says, in one scrubbed line. Further lines quote the rows and inputs it stumbled over."""
    return scrub_text(str(error).strip().partition("\n")[0] or type(error).__name__)


class Redactor:
    """Masks fields and texts. `preview` shows the scrubbed beginning of message bodies; `on_masked` is
    told of every value masked."""

    def __init__(self, *, preview: bool = False, on_masked: Callable[[Masked], None] | None = None) -> None:
        self._preview = preview
        self._on_masked = on_masked or (lambda kind: None)

    def fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """All fields of a log line or a span."""
        return {key: value if key in OURS else self.value(key, value) for key, value in fields.items()}

    def value(self, key: str, value: Any) -> Any:
        """One field, masked as its name and its content demand, whatever is nested in it."""
        if value is None or isinstance(value, bool):
            return value
        rule = _rule_of(key[-_KEY_LIMIT:])
        if rule == "secret" or rule == "name":
            self._on_masked(rule)
            return REDACTED
        if isinstance(value, str):  # first, because most are
            return value if key in _IDS and _ID.fullmatch(value) else self._text(rule, value)
        if isinstance(value, (int, float)):
            return self._text(rule, str(value)) if _could_be_phone(rule, value) else value
        if isinstance(value, Mapping):
            return {self.text(str(name)): self.value(str(name), item) for name, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.value(key, item) for item in value]
        return self._text(rule, str(value))

    def text(self, text: str, limit: int = TEXT_LIMIT) -> str:
        """Free text. What reaches across the limit is left out, not cut in two: half of a phone number
        would no longer be recognised as one."""
        shown = text[: limit + _OVERLAP]
        if "%" in shown:
            # Addresses first: what looks like an escape may as well be part of one.
            shown = _EMAIL.sub(self._mask, _ESCAPED_AT.sub("@", shown))
            shown = _ESCAPES.sub(_decoded, shown)
        if len(shown) > limit:
            found = _FREE_TEXT.finditer(shown)
            shown = shown[: next((match.start() for match in found if match.end() >= limit), limit)][:limit] + "…"
        return _FREE_TEXT.sub(self._mask, shown) if _SUSPECT.search(shown.casefold()) else shown

    def _text(self, rule: Rule, value: str) -> str:
        if rule == "phone":
            self._on_masked("phone")
            return _last_digits(value)
        if rule == "body":
            self._on_masked("body")
            return self.text(value, PREVIEW) if self._preview else f"[body {len(value)} chars]"
        if rule == "address":
            return self._address(value)
        return self.text(value)

    def _address(self, value: str) -> str:
        """Where something is, without the path and the query, which are what somebody asked for."""
        origin = _ORIGIN.match(value)
        assert origin is not None
        if len(origin[0]) == len(value):
            return self.text(value)
        self._on_masked("secret")
        return f"{self.text(origin[0])}/{REDACTED}"

    def _mask(self, match: re.Match[str]) -> str:
        found = match[0]
        match match.lastgroup:
            case "secret":
                self._on_masked("secret")
                return REDACTED
            case "email":
                self._on_masked("email")
                return "***" + found.rpartition("@")[2][-4:]
            case "phone":
                self._on_masked("phone")
                return _last_digits(found)
        return found


_KEY_LIMIT: Final = 64


@lru_cache(maxsize=4096)
def _rule_of(key: str) -> Rule:
    name = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()).strip("_")
    if _SECRET_KEY.search(name):
        return "secret"
    if _NAME_KEY.fullmatch(name):
        return "name"
    if _PHONE_KEY.fullmatch(name):
        return "phone"
    if _BODY_KEY.fullmatch(name):
        return "body"
    if _ADDRESS_KEY.fullmatch(name):
        return "address"
    return "number" if _NUMBER_KEY.fullmatch(name) else "text"


def _could_be_phone(rule: Rule, number: float) -> bool:
    """In a field of unknown meaning a long whole number may well be somebody's."""
    return rule in ("phone", "body") or (rule == "text" and abs(number) >= 10_000_000 and number == number // 1)


def _last_digits(number: str) -> str:
    digits = [character for character in number if character.isdigit()]
    return "***" + ("".join(digits[-4:]) if len(digits) > 4 else "")


def _decoded(match: re.Match[str]) -> str:
    return unquote(_ESCAPED_PERCENT.sub("%", match[0]))


class RedactingSpanExporter(SpanExporter):
    """Masks what leaves the process: attributes, events, and the status that carries an exception's text.

    Wrapped around the exporter, so it costs the export thread and only for spans that are exported.
    """

    def __init__(self, exporter: SpanExporter, redactor: Redactor) -> None:
        self._exporter = exporter
        self._redactor = redactor

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([self._redacted(span) for span in spans])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def _redacted(self, span: ReadableSpan) -> ReadableSpan:
        redactor, status = self._redactor, span.status
        described = None if status.description is None else redactor.text(status.description)
        return ReadableSpan(
            name=span.name,
            context=span.context,
            parent=span.parent,
            resource=span.resource,
            attributes=redactor.fields(span.attributes or {}),
            events=[
                Event(event.name, redactor.fields(event.attributes or {}), event.timestamp) for event in span.events
            ],
            links=span.links,
            kind=span.kind,
            status=Status(status.status_code, described),
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )
