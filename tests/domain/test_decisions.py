"""The recorder on a real database: what becomes a row, when it happened, and what becomes of it in bad times."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import pytest

from libs.domain.catalogue import CATALOGUE
from libs.domain.db import Database
from libs.domain.decisions import log, recorder
from libs.domain.decisions.recorder import Recorder
from libs.domain.telemetry import GuardTelemetry
from libs.guardrails import (
    AppointmentFacts,
    AppointmentRef,
    Claim,
    Facts,
    FixedFlags,
    Flags,
    Guard,
    Operation,
    Principal,
    Refused,
    Role,
    SessionFacts,
    SessionKind,
    SessionRef,
    SessionStatus,
)
from libs.guardrails.operations import CompleteSession, GetMessages, SendMessage
from libs.observability.context import bind
from libs.observability.registry import Metrics
from libs.observability.testing import capture_logs
from tests.api.calls import Owner
from tests.api.test_failures import wire_to
from tests.clinic import Clinic
from tests.clock import Clock
from tests.conftest import Urls
from tests.processes import until

PATIENT, DOCTOR = 10, 20
SESSION = SessionRef(SessionKind.TEXT, 7)
LIVE = Facts(
    True,
    AppointmentFacts(12, "IN_PROGRESS", PATIENT, DOCTOR, due_in=-90.0),
    SessionFacts(7, SessionKind.TEXT, SessionStatus.ACTIVE, PATIENT, DOCTOR, 12, conversation_id=5),
)
NOTHING = Facts(True)
CORRELATION_ID = "550e8400-e29b-41d4-a716-446655440000"


class Desk:
    """A guard whose verdicts a recorder records."""

    def __init__(self, database: Database, tenant_id: int, *, sample_rate: float = 0.0, **flags: bool) -> None:
        self.metrics = Metrics(CATALOGUE, version="0", service="test")
        self.recorder = Recorder(database, self.metrics, sample_rate=sample_rate)
        self.guard = Guard(FixedFlags(Flags(**flags)), GuardTelemetry(self.metrics, self.recorder))
        self.patient = Principal(PATIENT, tenant_id, Role.PATIENT)

    def ask(
        self, subject: SessionRef | AppointmentRef, facts: Facts = LIVE, operation: type[Operation] = SendMessage
    ) -> None:
        with suppress(Refused):
            self.guard.open(Claim(operation, self.patient, subject), facts)

    def dropped(self, verdict: str) -> float:
        return self.metrics.sample("guard_decisions_dropped_total", verdict=verdict)


@asynccontextmanager
async def refusing_rows(owner: Owner) -> AsyncIterator[None]:
    """While somebody else keeps the table, nothing can be written."""
    async with owner.transaction():
        await owner.execute("LOCK TABLE decisions IN ACCESS EXCLUSIVE MODE")
        yield


async def recorded(clinic: Clinic) -> list[tuple[Any, ...]]:
    rows = await clinic.fetch("SELECT operation, identifier, verdict, reason FROM decisions ORDER BY id")
    return [tuple(row) for row in rows]


async def total(clinic: Clinic) -> int:
    number: int = await clinic.fetchval("SELECT coalesce(sum(requests), 0)::bigint FROM decision_totals")
    return number


async def test_refusals_and_warnings_become_rows_with_all_that_is_known(clinic: Clinic) -> None:
    watching = Desk(clinic.database, clinic.tenant_id)
    enforcing = Desk(clinic.database, clinic.tenant_id, enforce_session_gated_chat=True)
    async with watching.recorder.writing(), enforcing.recorder.writing():
        with bind(client="okhttp", correlation_id=CORRELATION_ID):
            watching.ask(AppointmentRef(12))
        watching.ask(SESSION)
        watching.ask(SESSION, NOTHING)
        watching.ask(AppointmentRef(13), NOTHING)
        enforcing.ask(AppointmentRef(12), operation=GetMessages)
    rows = [dict(row) for row in await clinic.fetch("SELECT * FROM decisions")]
    warned, unknown_session, unknown_appointment, refused = sorted(
        rows, key=lambda row: (row["operation"] == "get_messages", row["id"])
    )
    flags = warned.pop("flags")
    assert warned | {"id": 0, "at": None} == {
        "id": 0,
        "tenant_id": clinic.tenant_id,
        "at": None,
        "operation": "send_message",
        "identifier": "12",
        "appointment_id": 12,
        "session_id": 7,
        "user_id": PATIENT,
        "role": "patient",
        "client": "okhttp",
        "verdict": "warned",
        "reason": "SESSION_CONTEXT_REQUIRED",
        "flag": "ENFORCE_SESSION_GATED_CHAT",
        "correlation_id": CORRELATION_ID,
    }
    assert flags == dict.fromkeys(flags, False)
    assert len(flags) == 4
    assert (refused["verdict"], refused["reason"]) == ("refused", "SESSION_CONTEXT_REQUIRED")
    assert refused["flags"] == flags | {"ENFORCE_SESSION_GATED_CHAT": True}
    assert (refused["client"], refused["correlation_id"]) == ("unknown", None)
    assert (unknown_session["session_id"], unknown_session["appointment_id"]) == (7, None)
    assert (unknown_session["identifier"], unknown_session["reason"]) == ("text_session:7", "SESSION_NOT_FOUND")
    assert (unknown_appointment["session_id"], unknown_appointment["appointment_id"]) == (None, 13)


async def test_every_verdict_is_counted_by_minute_and_only_some_become_rows(clinic: Clinic) -> None:
    for _ in range(2):
        desk = Desk(clinic.database, clinic.tenant_id)
        async with desk.recorder.writing():
            for _ in range(50):
                desk.ask(SESSION)
            desk.ask(AppointmentRef(12))
            desk.ask(SESSION, NOTHING)
    rows = await clinic.fetch(
        "SELECT tenant_id, operation, verdict, flag, sum(requests)::int FROM decision_totals GROUP BY 1, 2, 3, 4"
    )
    assert sorted(map(tuple, rows)) == [
        (clinic.tenant_id, "send_message", "allowed", "", 100),
        (clinic.tenant_id, "send_message", "refused", "", 2),
        (clinic.tenant_id, "send_message", "warned", "ENFORCE_SESSION_GATED_CHAT", 2),
    ]
    assert await clinic.fetchval("SELECT bool_and(minute = date_trunc('minute', minute)) FROM decision_totals")
    assert len(await recorded(clinic)) == 4


async def test_a_sample_of_what_was_allowed_becomes_rows(clinic: Clinic) -> None:
    for rate, fewest, most in ((1.0, 500, 500), (0.1, 20, 100), (0.0, 0, 0)):
        desk = Desk(clinic.database, clinic.tenant_id, sample_rate=rate)
        before = len(await recorded(clinic))
        async with desk.recorder.writing():
            for _ in range(500):
                desk.ask(SESSION)
        assert fewest <= len(await recorded(clinic)) - before <= most


async def test_strangers_leave_nothing_behind(clinic: Clinic) -> None:
    desk = Desk(clinic.database, tenant_id=987654)
    async with desk.recorder.writing():
        desk.ask(SESSION, Facts(caller_active=False))
    assert (await recorded(clinic), await total(clinic)) == ([], 0)
    assert (
        desk.metrics.sample(
            "guard_verdicts_total", operation="send_message", verdict="refused", reason="UNAUTHENTICATED"
        )
        == 1
    )


async def test_a_row_says_when_it_was_decided_and_not_when_it_was_written(clinic: Clinic, owner: Owner) -> None:
    desk = Desk(clinic.database, clinic.tenant_id)
    async with desk.recorder.writing(), refusing_rows(owner):
        before: datetime = await clinic.fetchval("SELECT clock()")
        desk.ask(SESSION, NOTHING)
        after: datetime = await clinic.fetchval("SELECT clock()")
        await asyncio.sleep(3 * recorder.FLUSH_SECONDS)
    written = await clinic.fetchval("SELECT at FROM decisions")
    slack = timedelta(milliseconds=50)
    assert before - slack <= written <= after + slack


async def test_rows_are_there_within_half_a_second(clinic: Clinic) -> None:
    desk = Desk(clinic.database, clinic.tenant_id)
    async with desk.recorder.writing():
        for _ in range(3):
            before = len(await recorded(clinic))
            desk.ask(SESSION, NOTHING)

            async def there(before: int = before) -> bool:
                return len(await recorded(clinic)) > before

            await until(there, seconds=0.5)


async def test_when_the_queue_is_full_samples_drop_and_the_refused_wait(
    clinic: Clinic, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "ROOM", 10)
    monkeypatch.setattr(recorder, "LIMIT", 20)
    desk = Desk(clinic.database, clinic.tenant_id, sample_rate=1.0)
    async with desk.recorder.writing(), asyncio.timeout(10):
        async with refusing_rows(owner):
            for _ in range(12):
                desk.ask(SESSION)
            assert desk.dropped("allowed") == 2
            for _ in range(9):
                desk.ask(SESSION, NOTHING)
            desk.ask(AppointmentRef(12))
            assert (desk.dropped("refused"), desk.dropped("warned")) == (0, 0)
            waiting = asyncio.create_task(desk.recorder.room())
            _, pending = await asyncio.wait({waiting}, timeout=2 * recorder.FLUSH_SECONDS)
            assert pending
            desk.ask(SESSION, NOTHING)
            desk.ask(AppointmentRef(12))
            assert (desk.dropped("refused"), desk.dropped("warned")) == (1, 1)
        await waiting
        await desk.recorder.room()
    verdicts = [verdict for _, _, verdict, _ in await recorded(clinic)]
    assert verdicts == ["allowed"] * 10 + ["refused"] * 9 + ["warned"]
    assert await total(clinic) == 12 + 10 + 2, "What is dropped is counted all the same."


async def test_the_refused_do_not_wait_for_ever(clinic: Clinic, owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "ROOM", 1)
    monkeypatch.setattr(recorder, "PATIENCE_SECONDS", 0.05)
    desk = Desk(clinic.database, clinic.tenant_id)
    async with desk.recorder.writing(), refusing_rows(owner), asyncio.timeout(5):
        desk.ask(SESSION, NOTHING)
        await desk.recorder.room()


async def test_more_than_one_batch_is_written_whole(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "BATCH", 7)
    desk = Desk(clinic.database, clinic.tenant_id)
    async with desk.recorder.writing():
        for number in range(1, 31):
            desk.ask(AppointmentRef(number), NOTHING)
    assert [identifier for _, identifier, _, _ in await recorded(clinic)] == [str(n) for n in range(1, 31)]
    assert await total(clinic) == 30


async def test_a_database_that_goes_away_loses_nothing(
    clinic: Clinic, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "FLUSH_SECONDS", 0.02)
    async with wire_to(urls.app) as (wire, address):
        database = Database(address, application="tests", pool_size=2)
        desk = Desk(database, clinic.tenant_id)
        async with desk.recorder.writing():
            for number in range(1, 301):
                desk.ask(AppointmentRef(number), NOTHING)
                if number % 100 == 50:
                    wire.cut()
                elif number % 100 == 0:
                    wire.state = "whole"
                await asyncio.sleep(0.002)

            async def all_there() -> bool:
                return await total(clinic) >= 300

            await until(all_there)
        await database.close()
    assert sorted(int(identifier) for _, identifier, _, _ in await recorded(clinic)) == list(range(1, 301))
    assert await total(clinic) == 300


async def test_decisions_are_kept_for_thirty_days(
    clinic: Clinic, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def decide(number: int) -> None:
        desk = Desk(clinic.database, clinic.tenant_id)
        async with desk.recorder.writing():
            for _ in range(number):
                desk.ask(SESSION, NOTHING)

    monkeypatch.setattr(log, "PRUNED_AT_ONCE", 3)
    await decide(5)
    await clock.advance(timedelta(days=29))
    await decide(2)
    await log.prune(clinic.database)
    assert (len(await recorded(clinic)), await total(clinic)) == (7, 7)
    await clock.advance(timedelta(days=1, minutes=1))
    await log.prune(clinic.database)
    assert len(await recorded(clinic)) == 4, "At most so many at once."
    await log.prune(clinic.database)
    await log.prune(clinic.database)
    assert (len(await recorded(clinic)), await total(clinic)) == (2, 2)


async def test_the_flags_of_a_row_are_those_that_decided(clinic: Clinic) -> None:
    desk = Desk(clinic.database, clinic.tenant_id, allow_legacy_appointment_chat=True)
    early = Facts(True, AppointmentFacts(12, "CONFIRMED", PATIENT, DOCTOR, due_in=90.0))
    async with desk.recorder.writing():
        desk.ask(AppointmentRef(12), early)
        desk.ask(AppointmentRef(12), operation=CompleteSession)
    rows = await clinic.fetch("SELECT reason, flag, flags FROM decisions ORDER BY id")
    assert [(row["reason"], row["flag"]) for row in rows] == [
        ("SESSION_NOT_READY", "ALLOW_LEGACY_APPOINTMENT_CHAT"),
        ("SESSION_CONTEXT_INVALID", None),
    ]
    for row in rows:
        assert {flag for flag, value in row["flags"].items() if value} == {"ALLOW_LEGACY_APPOINTMENT_CHAT"}


@pytest.mark.parametrize("committed", [True, False])
async def test_a_commit_that_is_never_answered_is_neither_repeated_nor_lost(
    clinic: Clinic, owner: Owner, urls: Urls, committed: bool
) -> None:
    """The server commits or is killed while it does; either way the answer does not arrive."""
    await owner.execute(
        """
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON decisions
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION dawdle();
        """
    )
    committing = "SELECT pid FROM pg_stat_activity WHERE query = 'COMMIT;' AND wait_event = 'PgSleep'"
    async with wire_to(urls.app) as (wire, address):
        database = Database(address, application="tests", pool_size=2)
        desk = Desk(database, clinic.tenant_id)
        async with desk.recorder.writing():
            desk.ask(SESSION, NOTHING)
            pid = await until(lambda: owner.fetchval(committing))
            wire.cut()
            if not committed:
                await owner.execute("SELECT pg_terminate_backend($1)", pid)
            wire.state = "whole"

            async def written() -> bool:
                return not desk.recorder._queue

            await until(written)
        await database.close()
    assert (len(await recorded(clinic)), await total(clinic)) == (1, 1)


async def test_the_end_of_a_process_does_not_wait_for_a_database_that_takes_nothing(
    clinic: Clinic, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "STOP_SECONDS", 0.1)
    desk = Desk(clinic.database, clinic.tenant_id)
    with capture_logs() as logs:
        async with refusing_rows(owner), asyncio.timeout(2), desk.recorder.writing():
            desk.ask(SESSION, NOTHING)
        assert [line["waiting"] for line in logs.lines("decisions_not_written")] == [1]
