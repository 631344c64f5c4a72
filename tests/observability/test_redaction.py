"""What the redactor masks, what it leaves alone, and what it costs."""

import base64
import hashlib
import logging
import random
import re
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import product
from urllib.parse import quote, quote_plus
from uuid import UUID

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs.observability.logging import get_logger
from libs.observability.redaction import (
    OURS,
    PREVIEW,
    REDACTED,
    TEXT_LIMIT,
    Masked,
    RedactingSpanExporter,
    Redactor,
    scrub_text,
)
from libs.observability.testing import capture_logs

PHONE = "+4915112345678"
EMAIL = "jane.roe@example.com"
JWT = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b'{"alg":"HS256"}', b'{"sub":"7"}', b"x")
)

FORMATS = (
    "+1{a}{b}{c}",
    "+1 {a} {b} {c}",
    "+1-{a}-{b}-{c}",
    "+1 ({a}) {b}-{c}",
    "+1 ({a}) - {b} - {c}",
    "({a}) {b}-{c}",
    "{a}-{b}-{c}",
    "{a}.{b}.{c}",
    "{a} {b} {c}",
    "{a}{b}{c}",
    "001{a}{b}{c}",
    "+49 (0) {a} {b}{c}",
    "tel:+1-{a}-{b}-{c}",
    "client:{a}{b}{c}",
    "%2B1{a}{b}{c}",
    "%252B1{a}{b}{c}",
    "+1\u00a0{a}\u2011{b}\u2011{c}",
)


def digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


def phones(form: str) -> Iterator[tuple[str, str]]:
    """A thousand numbers of that form, each with its last four digits."""
    rng = random.Random(form)
    for _ in range(1000):
        a, b, c = rng.randint(200, 999), rng.randint(200, 999), f"{rng.randint(0, 9999):04}"
        yield form.format(a=a, b=b, c=c), c


def emails() -> Iterator[tuple[str, str]]:
    """Five thousand addresses, each with what may be shown of it."""
    rng = random.Random(1)
    local, domain = string.ascii_letters + string.digits + "._+-'!#$&*=^~%", string.ascii_lowercase + string.digits
    for _ in range(5000):
        name = "x" + "".join(rng.choices(local, k=rng.randint(2, 20))) + "y"
        host = "".join(rng.choices(domain, k=rng.randint(4, 12))) + rng.choice((".com", ".co.uk", ".museum"))
        yield f"{name}{rng.choice(('@', '%40', '%2540'))}{host}", f"***{host[-4:]}"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("encode", [str, quote, quote_plus, lambda number: quote(quote(number))])
def test_no_phone_number_shows_more_than_its_last_four_digits(form: str, encode: Callable[[str], str]) -> None:
    leaks = []
    for number, last in phones(form):
        masked = scrub_text(f"Cannot call /?to={encode(number)}&busy=")
        if digits(masked) != last:
            leaks.append((number, masked))
    assert leaks == []


def test_no_email_address_shows_its_local_part_or_its_whole_domain() -> None:
    leaks = []
    for address, shown in emails():
        masked = scrub_text(f"to <{address}>, bounced")
        if masked != f"to <{shown}>, bounced":
            leaks.append((address, masked))
    assert leaks == []


def told(texts: Iterable[str]) -> Iterator[str]:
    """Each text as it leaves the process, by all the ways there are: the field of a line, what an exception says, a
    record of a library, and the attributes, the exception and the status of a span."""
    exported = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(RedactingSpanExporter(exported, Redactor())))
    tracer, log, library = provider.get_tracer("test"), get_logger("chat", "conversation"), logging.getLogger("library")
    with capture_logs() as captured:
        for number, text in enumerate(texts):
            with suppress(LookupError), tracer.start_as_current_span("x", attributes={"note": text}):
                log.info("told", note=text)
                library.warning("%s", text)
                log.error("failed", exc_info=LookupError(text))
                raise LookupError(text)
            if number % 1000 == 0:
                captured.raw()  # no more may wait than the writer has room for
        for line in captured.lines():
            yield line.get("note") or line.get("error_message") or line["message"]
    for span in exported.get_finished_spans():
        assert span.attributes is not None
        yield str(span.attributes["note"])
        yield str(span.status.description).removeprefix("LookupError: ")
        (event,) = span.events
        assert event.attributes is not None
        yield str(event.attributes["exception.message"])


def test_no_phone_number_and_no_email_address_leaves_the_process() -> None:
    private = list(emails())
    for form in FORMATS:
        prefix = form[: form.find(":") + 1]  # such as `tel:`
        private += ((number, f"{prefix}***{last}") for number, last in phones(form))
    random.Random(3).shuffle(private)
    # Twenty in one text, since each way takes its time.
    texts = [private[start : start + 20] for start in range(0, len(private), 20)]
    shown = Counter(" | ".join(shown for _, shown in text) for text in texts)
    assert Counter(told(" | ".join(hidden for hidden, _ in text) for text in texts)) == Counter(
        {text: 6 * number for text, number in shown.items()}
    )


def test_a_very_short_address_shows_nothing_of_its_local_part() -> None:
    assert scrub_text("from a@b") == "from ***b"


def test_ids_moments_addresses_and_hashes_are_no_phone_numbers() -> None:
    rng = random.Random(2)
    moment = datetime(2025, 1, 1, tzinfo=UTC)
    harmless = []
    for _ in range(500):
        bits = rng.getrandbits(128)
        moment += timedelta(seconds=rng.randint(1, 100_000), microseconds=rng.randint(0, 999_999))
        harmless += [
            str(UUID(int=bits)),
            str(UUID(int=bits)).upper(),
            moment.isoformat(),
            moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
            moment.strftime("%Y-%m-%d"),
            ".".join(str(rng.randint(0, 255)) for _ in range(4)),
            hashlib.sha256(str(bits).encode()).hexdigest(),
            "SM" + hashlib.md5(str(bits).encode()).hexdigest(),
            f"{rng.randint(0, 999)}.{rng.randint(0, 99):02} EUR",
        ]
    changed = [text for text in harmless if scrub_text(f"saw {text}, fine") != f"saw {text}, fine"]
    assert changed == []


CREDENTIALS = [
    "Bearer abc.DEF-123",
    "bearer   abc.DEF-123",
    JWT,
    JWT[: len(JWT) // 2],
    "postgresql://user:hunter2@db.example/app",
    "postgresql+asyncpg://user:hun%40ter2@db.example:5432/app?ssl=true",
    "redis://:hunter2@cache:6379/0",
    "SESSIONGATE_DATABASE_URL=postgresql://u:hunter2@h/db",
    "postgresql://u:p@h/db",
    "password=hunter2 host=db",
    "wss://h/socket?access_token=hunter2&room=7",
    '{"api_key": "hunter2"}',
    "Basic dTpodW50ZXIy",
    "X-Api-Key: hunter2",
    "Set-Cookie: sid=hunter2; room=abc.DEF-123",
    "whsec_dTpodW50ZXIydTpodW50ZXIy",
    "ticket.dTpodW50ZXIydTpodW50ZXIy",
]
PARTS = ("dTpodW", "abc.DEF", "hunter2", "hun", "ter2", "u:p", ":p@", JWT[:20], JWT[20:40])


@pytest.mark.parametrize("secret", CREDENTIALS)
def test_credentials_are_masked_wherever_they_are_quoted(secret: str) -> None:
    masked = scrub_text(f"refused: {secret} (try again)")
    assert [part for part in PARTS if part in masked] == []
    assert "[redacted]" in masked
    assert masked.endswith("(try again)")


def test_letters_that_are_another_only_to_those_who_ignore_case_hide_no_credential() -> None:
    ascii_letter = re.compile("[a-z]", re.IGNORECASE)
    others = [other for other in map(chr, range(128, sys.maxunicode + 1)) if ascii_letter.fullmatch(other)]
    assert len(others) >= 4
    keys = ("cookie=", "api_key=", "token=", "password=", "secret=", "bearer ", "basic ", "ticket.", "whsec_")
    for text in (key + "hunterhunterHunter" for key in keys):
        assert "[redacted]" in scrub_text(text)
        for letter, other in product(string.ascii_lowercase, others):
            if re.fullmatch(letter, other, re.IGNORECASE):
                assert "[redacted]" in scrub_text(text.replace(letter, other)), (text, other)


def test_no_credential_leaves_the_process() -> None:
    texts = list(told(CREDENTIALS))
    assert len(texts) == 6 * len(CREDENTIALS)
    assert [text for text in texts for part in PARTS if part in text] == []


def test_a_word_that_merely_looks_like_a_token_stays() -> None:
    text = "Reykjavik, heyJude.mp, a basic subscription with 5 tokens, a ticket.of the cookie monster"
    assert scrub_text(text) == text


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "accessToken",
        "access_token",
        "Set-Cookie",
        "http.request.header.authorization",
        "apiKey",
        "X-API-Key",
        "webhookSignature",
        "db.password",
        "card",
        "otp",
        "PIN",
    ],
)
def test_a_field_with_the_name_of_a_secret_shows_nothing(key: str) -> None:
    assert Redactor().value(key, "12345") == REDACTED
    assert Redactor().value(key, 12345) == REDACTED
    assert Redactor().value(key, {"value": "12345"}) == REDACTED


@pytest.mark.parametrize(
    "key", ["name", "firstName", "patient.full_name", "doctor_first_name", "address", "dob", "birthDate"]
)
def test_a_field_with_the_name_of_a_name_shows_nothing(key: str) -> None:
    assert Redactor().value(key, "Jane Roe") == REDACTED


@pytest.mark.parametrize("key", ["server.address", "client.address", "network.peer.address"])
def test_the_address_of_a_machine_is_nobodys(key: str) -> None:
    assert Redactor().value(key, "10.0.0.7") == "10.0.0.7"
    assert Redactor().value(f"{key}.street", "Elm Street") == REDACTED


@pytest.mark.parametrize("key", ["phone", "phoneNumber", "patient.phone", "to", "from", "caller_id", "homeTel"])
def test_a_field_for_phone_numbers_shows_four_digits_of_texts_and_integers(key: str) -> None:
    assert Redactor().value(key, "555-0123") == "***0123"
    assert Redactor().value(key, 5550123) == "***0123"
    assert Redactor().value(key, "123") == "***"
    assert Redactor().value(key, ["5550123", 5550124]) == ["***0123", "***0124"]


@pytest.mark.parametrize("key", ["body", "message_body", "messageBody", "sms.body", "text", "content", "transcript"])
def test_a_body_shows_its_length_alone(key: str) -> None:
    assert Redactor().value(key, "I feel unwell") == "[body 13 chars]"
    assert Redactor().value(key, 4915112345678) == "[body 13 chars]"


@pytest.mark.parametrize(
    "key", ["url", "http.url", "url.full", "http.target", "url.path", "url.query", "media_url", "redirectUri"]
)
def test_an_address_shows_no_path_and_no_query(key: str) -> None:
    masked = Redactor().value
    assert masked(key, "https://example.org/I-feel/unwell?q=x#y") == f"https://example.org/{REDACTED}"
    assert masked(key, "https://user:hunter2@example.org?q=x") == f"https://{REDACTED}@example.org/{REDACTED}"
    assert masked(key, "/api/v1/chat/unwell") == f"/{REDACTED}"
    assert masked(key, "q=unwell") == f"/{REDACTED}"
    assert masked(key, "https://example.org:8443") == "https://example.org:8443"
    assert masked(key, "") == ""


def test_the_preview_of_a_body_is_scrubbed_itself() -> None:
    preview = Redactor(preview=True)
    assert preview.value("body", f"call {PHONE} or {EMAIL}") == "call ***5678 or ***.com"
    assert preview.value("body", "a" * 80) == "a" * PREVIEW + "…"


@pytest.mark.parametrize(
    ("private", "hidden"),
    [
        (PHONE, PHONE[:-4]),
        ("+49 (0) 151 12345678", "151 1234"),
        (EMAIL, "jane.roe"),
        (JWT, JWT),
        ("redis://:hunter2@cache", "hunter2"),
        ("password=hunter2", "hunter2"),
    ],
)
@pytest.mark.parametrize("limit", [PREVIEW, TEXT_LIMIT])
def test_what_a_cut_would_halve_is_left_out(private: str, hidden: str, limit: int) -> None:
    for shift in range(len(private) + 2):
        text = "word " * limit
        text = f"{text[: limit - shift]} {private} and so on{text}"
        shown = Redactor().text(text, limit)
        assert len(shown) <= limit + len(REDACTED)
        assert digits(shown) in ("", digits(private)[-4:])
        for start in range(len(hidden) - 3):
            assert hidden[start : start + 4] not in shown


def test_nested_values_are_masked_under_their_own_names() -> None:
    masked = Redactor().fields(
        {
            "payload": {
                "user": {"email": EMAIL, "phone": "555-0123", "Password": "x"},
                "notes": [f"ring {PHONE}", {"body": "private"}, (EMAIL,)],
                EMAIL: "key",
                7: EMAIL,
                "event": f"ring {PHONE}",
                "level": EMAIL,
            }
        }
    )
    assert masked == {
        "payload": {
            "user": {"email": "***.com", "phone": "***0123", "Password": REDACTED},
            "notes": ["ring ***5678", {"body": "[body 7 chars]"}, ["***.com"]],
            "***.com": "key",
            "7": "***.com",
            "event": "ring ***5678",
            "level": "***.com",
        }
    }


def test_long_whole_numbers_are_masked_unless_their_field_is_for_numbers() -> None:
    masked = Redactor().value
    assert masked("extra", 4915112345678) == "***5678"
    assert masked("extra", 4915112345678.0) == "***6780"
    assert masked("extra", -41555501) == "-***5501"
    assert masked("extra", 4111111111111111) == "***1111"
    assert masked("extra", 1234567) == 1234567
    assert masked("extra", 12345678.25) == 12345678.25
    for key in ("session_id", "runtime_ms", "created_at", "duration_seconds", "messageCount", "timestamp"):
        assert masked(key, 1751234567123) == 1751234567123


@pytest.mark.parametrize("key", ["client_message_id", "event_id", "caller_id", "correlation_id"])
def test_an_id_chosen_by_a_client_is_free_text(key: str) -> None:
    for chosen in (PHONE, "001-415-555-0123", "4155550123-000000", EMAIL):
        assert chosen[:-6] not in Redactor().value(key, chosen)
    kept = "550e8400-e29b-41d4-a716-446655440000"
    if key != "caller_id":
        assert Redactor().value(key, kept) == kept


@pytest.mark.parametrize(
    "key", ["correlation_id", "causation_id", "connection_id", "event_id", "fingerprint", "stack_fingerprint"]
)
def test_an_id_may_be_of_digits_alone(key: str) -> None:
    for chosen in ("0" * 32, "1234567890123456", "12345678-1234-1234-1234-123456789012"):
        assert Redactor().value(key, chosen) == chosen
    assert Redactor().value(key, "415555012345678") == "***5678"


def test_fields_of_the_program_itself_are_left_alone() -> None:
    line = dict.fromkeys(OURS, "0123456789")
    assert Redactor().fields(line) == line


def test_every_masked_value_is_counted_by_its_kind() -> None:
    seen: Counter[Masked] = Counter()
    Redactor(on_masked=lambda kind: seen.update([kind])).fields(
        {"token": 1, "name": "J", "phone": "1", "body": "b", "note": f"{EMAIL} {PHONE} Bearer x {EMAIL}"}
    )
    assert seen == {"secret": 2, "name": 1, "phone": 2, "body": 1, "email": 2}


@pytest.mark.parametrize(
    "attack",
    [
        "1" * 100_000,
        "1 " * 50_000,
        "1234567-" * 12_500,
        "1234567    x" * 8_000,
        "+(" * 50_000,
        "a" * 100_000 + "@",
        "a." * 50_000,
        "a@" * 50_000,
        "a@b." * 25_000,
        "://a:" * 20_000,
        "://" + "a" * 100_000,
        "eyJ" + "a." * 50_000,
        "eyJ" * 33_000,
        "bearer " * 14_000,
        "f1" * 50_000 + "!",
        "password" * 12_500,
        "1.1.1." * 17_000,
        "2025-01-01 " * 9_000,
        "%2540" * 20_000,
        "%25" * 33_000,
    ],
    ids=lambda attack: attack[:12],
)
def test_hostile_text_of_100_kb_costs_less_than_50_ms(attack: str) -> None:
    fastest = min(_seconds(attack) for _ in range(3))
    assert fastest < 0.05


def _seconds(text: str) -> float:
    began = time.perf_counter()
    scrub_text(text)
    return time.perf_counter() - began
