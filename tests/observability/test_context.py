"""What is bound to a line of work, and how it travels."""

import asyncio
import re
from contextlib import suppress
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from libs.observability.context import (
    accept_correlation_id,
    bind,
    carrier,
    client,
    client_family,
    continued,
    correlation_id,
    fields,
    new_correlation_id,
    note,
)
from libs.observability.registry import Metrics
from libs.observability.tracing import configure_tracing, span

ID = "550e8400-e29b-41d4-a716-446655440000"


@given(st.uuids(), st.booleans(), st.booleans())
def test_a_uuid_or_its_hex_digits_are_accepted_as_they_are(value: UUID, dashes: bool, upper: bool) -> None:
    offered = str(value) if dashes else value.hex
    offered = offered.upper() if upper else offered
    assert accept_correlation_id(offered) == offered


@given(st.one_of(st.none(), st.text(), st.text("0123456789abcdef-", min_size=30, max_size=38)))
@example(ID + "\n")
@example(" " + ID)
@example(ID[:-1])
@example(ID + "0")
@example("٠" * 32)
@example("g" * 32)
def test_whatever_else_is_offered_gives_way_to_a_new_id(offered: str | None) -> None:
    accepted = accept_correlation_id(offered)
    assert re.fullmatch(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", accepted, re.ASCII)
    if accepted != offered:
        assert UUID(accepted).version == 4


@pytest.mark.parametrize(
    ("user_agent", "family"),
    [
        ("okhttp/4.12.0", "okhttp"),
        ("OkHttp", "okhttp"),
        ("Mozilla/5.0 (X11; Linux x86_64) Firefox/130.0", "mozilla"),
        ("python-httpx/0.28 okhttp/4", "python-httpx"),
        ("x" * 40 + "/1", "x" * 40),
        ("x" * 41 + "/1", "unknown"),
        ("", "unknown"),
        (" okhttp/4", "unknown"),
        ("jo@example.org", "unknown"),
        ("265991234567/1", "unknown"),
        ("okhttp\n/1", "unknown"),
        ("<script>/1", "unknown"),
        ("ökhttp/1", "unknown"),
        ("(okhttp)", "unknown"),
    ],
)
def test_the_family_of_a_client_is_the_name_of_its_first_product(user_agent: str, family: str) -> None:
    assert client_family(user_agent) == family
    with bind(client=client_family(user_agent)):
        assert client() == family
    assert client() == "unknown"


def test_new_ids_differ() -> None:
    assert new_correlation_id() != new_correlation_id()


def test_bound_fields_end_with_their_block_even_when_it_fails() -> None:
    with bind(a=1):
        with suppress(RuntimeError), bind(a=2, b=3):
            assert fields() == {"a": 2, "b": 3}
            raise RuntimeError
        assert fields() == {"a": 1}
    assert fields() == {}


def test_a_note_is_seen_by_whoever_opened_the_surrounding_block_and_ends_with_it() -> None:
    with bind(correlation_id=ID):
        note(user_id=7)
        assert fields() == {"correlation_id": ID, "user_id": 7}
    assert fields() == {}


async def test_a_note_made_by_an_awaited_coroutine_reaches_its_caller_but_not_its_neighbours() -> None:
    async def handler(user_id: int) -> object:
        with bind(correlation_id=str(user_id)):
            await deeper(user_id)
            return fields()["user_id"]

    async def deeper(user_id: int) -> None:
        await asyncio.sleep(0)
        note(user_id=user_id)

    assert await asyncio.gather(*map(handler, range(20))) == list(range(20))


def test_a_carrier_is_empty_when_nothing_is_bound() -> None:
    assert carrier() == {}


def test_a_carrier_takes_the_ids_and_nothing_else() -> None:
    with bind(correlation_id=ID, causation_id="c", tenant_id=3, user_id=7):
        assert carrier() == {"correlation_id": ID, "causation_id": "c", "tenant_id": "3"}


def test_what_a_carrier_took_is_bound_again_where_it_is_continued() -> None:
    with bind(correlation_id=ID, causation_id="c", tenant_id=3):
        carried = carrier()
    with continued(carried):
        assert fields() == {"correlation_id": ID, "causation_id": "c", "tenant_id": 3}
        assert correlation_id() == ID
        assert carrier() == carried
    assert correlation_id() is None


def test_a_carrier_with_nothing_in_it_leaves_what_is_bound() -> None:
    with bind(correlation_id=ID), continued({}):
        assert correlation_id() == ID


def test_a_carrier_names_the_present_span_in_the_standard_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.observability.tracing._tracing", None)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    configure_tracing("test", "0", Metrics((), version="0", service="test"))
    with span("work") as current:
        context = current.get_span_context()
        flags = int(context.trace_flags)
        assert carrier() == {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"}
