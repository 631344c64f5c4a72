"""The spans of what talks to others: statements, deliveries and their retries, requests to webhooks."""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import timedelta

import asyncpg
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from libs.domain.catalogue import CATALOGUE
from libs.domain.chat.send_statement import STORE
from libs.domain.db import Database, driver
from libs.domain.outbox.append import append
from libs.domain.outbox.dispatch import Dispatcher, Event
from libs.domain.outbox.events import Consumer, EventName, Lane
from libs.domain.statements import summary
from libs.domain.transaction import transaction
from libs.observability import tracing
from libs.observability.context import bind
from libs.observability.registry import Metrics
from libs.observability.testing import OtlpReceiver, attributes
from libs.observability.tracing import Tracing, configure_tracing, span
from tests.clinic import Clinic
from tests.clock import Clock
from tests.conftest import Urls
from tests.receiver import register

ID = "550e8400-e29b-41d4-a716-446655440000"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, collector: OtlpReceiver) -> Iterator[Tracing]:
    """Tracing that exports everything to `collector`."""
    monkeypatch.setattr(tracing, "_tracing", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
    configured = configure_tracing("test", "0", Metrics(CATALOGUE, version="0", service="test"))
    yield configured
    configured.shutdown()


@pytest.fixture
async def database(urls: Urls) -> AsyncIterator[Database]:
    """Made before tracing is configured, and not yet connected."""
    opened = Database(urls.app, application="tests", pool_size=10)
    yield opened
    await opened.close()


def exported(traced: Tracing, collector: OtlpReceiver) -> list[Span]:
    """All spans so far, in the order in which they ended."""
    traced.flush()
    return sorted(collector.spans(), key=lambda each: each.end_time_unix_nano)


def statements(spans: Sequence[Span]) -> list[str]:
    return [each.name for each in spans if "db.system.name" in attributes(each)]


async def test_each_statement_is_one_span_whichever_way_it_goes(
    database: Database, traced: Tracing, collector: OtlpReceiver
) -> None:
    for number in range(2):  # the second time on the same connections
        with span("work", number=number) as work:
            async with database.autocommit() as connection:
                await connection.fetchval("SELECT $1 || 'secret'", "parameter")
                await connection.fetchrow("SELECT name FROM users WHERE id = $1", 1)
            async with database.begin() as transacted:
                await transacted.execute(text("SELECT id FROM tenants WHERE name = :name"), {"name": "parameter"})
                bare = await driver(transacted)
                await bare.fetch("SELECT id FROM sessions")
        mine = [
            each
            for each in exported(traced, collector)
            if int.from_bytes(each.trace_id) == work.get_span_context().trace_id
        ]
        asked = [name for name in statements(mine) if name.startswith("SELECT")]
        assert asked[-4:] == ["SELECT", "SELECT users", "SELECT tenants", "SELECT sessions"]
        assert {"BEGIN", "COMMIT"} < set(statements(mine))
        (outer,) = [each for each in mine if each.name == "work"]
        for each in mine:
            if each is not outer:
                assert each.parent_span_id == outer.span_id
                assert each.kind == Span.SPAN_KIND_CLIENT
                assert outer.start_time_unix_nano <= each.start_time_unix_nano <= each.end_time_unix_nano
    assert "parameter" not in str(collector.spans())
    assert "secret" not in str(collector.spans())
    (one, _) = [each for each in collector.spans() if each.name == "SELECT users"]
    assert attributes(one) == {
        "db.system.name": "postgresql",
        "db.operation.name": "SELECT",
        "db.collection.name": "users",
    }


async def test_a_statement_that_fails_says_how(database: Database, traced: Tracing, collector: OtlpReceiver) -> None:
    with span("work"):
        async with database.autocommit() as connection:
            with pytest.raises(asyncpg.DivisionByZeroError):
                await connection.fetchval("SELECT 1 / $1::int", 0)
        with pytest.raises(DBAPIError):
            async with database.begin() as transacted:
                await transacted.execute(text("SELECT nothing FROM users"))
    failed = [each for each in exported(traced, collector) if each.status.code == Span().status.STATUS_CODE_ERROR]
    assert [(each.name, each.status.message) for each in failed] == [
        ("SELECT", "DivisionByZeroError"),
        ("SELECT users", "UndefinedColumnError"),
    ]


async def test_what_is_asked_outside_of_any_work_has_no_span(
    database: Database, traced: Tracing, collector: OtlpReceiver
) -> None:
    async with database.autocommit() as connection:
        await connection.fetchval("SELECT 1")
    async with database.begin() as transacted:
        await transacted.execute(text("SELECT 1"))
    assert exported(traced, collector) == []


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("SELECT 1", ("SELECT",)),
        ("select a, b\nfrom x where c", ("SELECT", "x")),
        ("\n  WITH y AS (SELECT 1 FROM z FOR UPDATE OF z)\n  SELECT FROM y", ("SELECT", "z")),
        ("WITH y AS (SELECT 1 FROM z FOR NO KEY UPDATE) UPDATE x SET a = 1", ("UPDATE", "x")),
        ("INSERT INTO x VALUES (1) ON CONFLICT DO UPDATE SET a = 1", ("INSERT", "x")),
        ("delete from x", ("DELETE", "x")),
        ("BEGIN;", ("BEGIN",)),
        ("COMMIT", ("COMMIT",)),
        (";", ()),
        ("", ()),
        (STORE, ("INSERT", "messages")),
    ],
)
def test_a_statement_is_named_after_what_it_is_about(statement: str, words: tuple[str, ...]) -> None:
    assert summary(statement) == words


class Refusing:
    """A consumer that does not take anything, until it is told to."""

    willing = False

    async def deliver(self, events: Sequence[Event]) -> None:
        if not self.willing:
            raise ValueError("call +49 151 23456789")


LANES = [("appointment_confirmed", "notifications"), ("session_started", "notifications"), ("session_ended", "webhook")]


@pytest.mark.parametrize(("event", "consumer"), LANES)
async def test_the_first_attempt_is_part_of_its_cause_and_a_retry_is_linked_to_it(
    clinic: Clinic, traced: Tracing, collector: OtlpReceiver, clock: Clock, event: str, consumer: str
) -> None:
    refusing = Refusing()
    dispatcher = Dispatcher(clinic.database, dict.fromkeys(Consumer, refusing), clinic.metrics)
    endpoint_id, _ = await register(clinic.database, clinic.operator, "https://example.com/", "session_ended")

    async def dispatch() -> None:
        for lane in (Lane.URGENT, Lane.NORMAL):
            await dispatcher.dispatch(lane)
        await dispatcher.dispatch_webhook(f"webhook:{endpoint_id}")

    with bind(correlation_id=ID), span("request"):
        async with transaction(clinic.database, clinic.bell) as tx:
            await append(tx, EventName(event), tenant_id=clinic.tenant_id, aggregate="x:1", payload={})
    with span("of somebody else"):
        await dispatch()
    await clock.advance(timedelta(hours=2))
    refusing.willing = True
    await dispatch()

    spans = {each.span_id: each for each in exported(traced, collector)}
    whose = consumer if consumer == "notifications" else f"webhook:{endpoint_id}"
    attempts = [each for each in spans.values() if attributes(each).get("consumer") == whose]
    first, retry = attempts
    written = spans[first.parent_span_id]
    assert (written.name, spans[written.parent_span_id].name) == ("outbox.write", "request")
    assert first.trace_id == written.trace_id
    assert (first.status.code, retry.status.code) == (2, 0)
    assert (retry.parent_span_id, [link.span_id for link in retry.links]) == (b"", [written.span_id])
    assert retry.trace_id != first.trace_id
    for attempt in attempts:
        assert (attempt.name, attempt.kind) == ("outbox.dispatch", Span.SPAN_KIND_CONSUMER)
        told = attributes(attempt)
        assert (told["correlation_id"], told["event_name"], told["tenant_id"]) == (ID, event, clinic.tenant_id)
        inside = [each for each in spans.values() if each.parent_span_id == attempt.span_id]
        assert {each.name for each in inside} >= {f"{consumer}.deliver", "UPDATE outbox_deliveries"}
        assert {attributes(each).get("correlation_id", ID) for each in inside} == {ID}
    assert "23456789" not in str(list(spans.values()))


async def test_deliveries_that_go_together_are_each_part_of_their_cause(
    clinic: Clinic, traced: Tracing, collector: OtlpReceiver
) -> None:
    refusing = Refusing()
    refusing.willing = True
    for number in range(3):
        with span("request"):
            async with transaction(clinic.database, clinic.bell) as tx:
                payload = {"number": number}
                name = EventName.APPOINTMENT_CONFIRMED
                await append(tx, name, tenant_id=clinic.tenant_id, aggregate=f"x:{number}", payload=payload)
    await Dispatcher(clinic.database, {Consumer.NOTIFICATIONS: refusing}, clinic.metrics).dispatch(Lane.NORMAL)

    spans = exported(traced, collector)
    traces = {each.trace_id for each in spans if each.name == "request"}
    assert len(traces) == 3
    by_id = {each.span_id: each for each in spans}
    delivered = [each for each in spans if each.name == "notifications.deliver"]
    assert {each.trace_id for each in delivered} == traces
    for each in delivered:
        dispatch = by_id[each.parent_span_id]
        assert (dispatch.name, by_id[dispatch.parent_span_id].name) == ("outbox.dispatch", "outbox.write")
        assert dispatch.start_time_unix_nano <= each.start_time_unix_nano <= each.end_time_unix_nano
        assert each.end_time_unix_nano <= dispatch.end_time_unix_nano


async def test_each_conversion_is_a_span_of_the_trace_that_confirmed_it_and_a_failure_its_error(
    clinic: Clinic, clock: Clock, traced: Tracing, collector: OtlpReceiver
) -> None:
    doctor = await clinic.doctor()
    busy = [await clinic.appointment(doctor), await clinic.appointment(doctor)]
    broken = await clinic.appointment(modality="hologram")
    confirmed = {}
    for appointment_id in (*busy, broken):
        confirmed[appointment_id] = f"{appointment_id:032x}"
        carried = {"traceparent": f"00-{confirmed[appointment_id]}-00000000000000aa-00"}
        await clinic.fetch("UPDATE appointments SET carrier = $2 WHERE id = $1", appointment_id, json.dumps(carried))
    for _ in range(2):
        await clinic.convert()
        await clock.advance(timedelta(minutes=2))

    spans = [each for each in exported(traced, collector) if each.name == "appointments.convert"]
    failed = [each for each in spans if each.status.code == Span().status.STATUS_CODE_ERROR]
    (created,) = [each for each in spans if each not in failed]
    assert created.trace_id.hex() == confirmed[busy[0]]
    assert created.parent_span_id.hex() == "00000000000000aa"
    first, again = failed
    assert {each.status.message for each in failed} == {"invalid_appointment_state"}
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (confirmed[broken], "00000000000000aa")
    assert again.parent_span_id == b""
    assert confirmed[broken] in [link.trace_id.hex() for link in again.links]
    told = await clinic.fetchval("SELECT trace_context ->> 'traceparent' FROM outbox_events")
    assert told == f"00-{confirmed[busy[0]]}-{created.span_id.hex()}-00"
