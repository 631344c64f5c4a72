"""Lines of the log on their way into a real database: what arrives, what gives way, and what is forgotten."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest

from libs.domain.catalogue import CATALOGUE
from libs.domain.db import Database
from libs.domain.logs import search, sink
from libs.domain.logs.search import Wanted, count, prune
from libs.domain.logs.sink import LogSink
from libs.observability.context import bind
from libs.observability.logging import Logging, LogSettings, configure_logging, get_logger
from libs.observability.registry import Metrics
from tests.api.test_failures import wire_to
from tests.clinic import Clinic
from tests.clock import Clock
from tests.conftest import Urls
from tests.log_lines import lines_of
from tests.processes import until

PHONE = "+4915112345678"
ID = "550e8400-e29b-41d4-a716-446655440000"

log = get_logger("chat", "conversation")


class Desk:
    """A process whose log, which is also a file, is stored."""

    def __init__(self, database: Database, path: Path, logging: Logging, metrics: Metrics) -> None:
        self.path = path
        self.logging = logging
        self.metrics = metrics
        self.sink = LogSink(database, metrics)

    def not_stored(self, level: str) -> float:
        return self.metrics.sample("log_lines_not_stored_total", level=level)


@contextmanager
def opened(database: Database, folder: Path, **settings: Any) -> Iterator[Desk]:
    metrics = Metrics(CATALOGUE, version="0", service="test")
    path = folder / "test.jsonl"
    logging = configure_logging(LogSettings("test", "0", **{"path": path, **settings}), metrics)
    try:
        yield Desk(database, path, logging, metrics)
    finally:
        logging.close()


@pytest.fixture
def desk(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(sink, "FLUSH_SECONDS", 0.02)
    with opened(database, tmp_path) as desk:
        yield desk


async def stored(clinic: Clinic) -> list[dict[str, Any]]:
    """The stored lines, parsed, in the order in which they came."""
    return [orjson.loads(row["line"]) for row in await clinic.fetch("SELECT line FROM log_lines ORDER BY id")]


async def until_stored(clinic: Clinic, number: int) -> list[dict[str, Any]]:
    async def all_there() -> list[dict[str, Any]]:
        found = await stored(clinic)
        return found if len(found) >= number else []

    found: list[dict[str, Any]] = await until(all_there)
    assert len(found) == number
    return found


async def test_a_line_is_stored_as_it_was_written_and_found_by_what_it_is_about(desk: Desk, clinic: Clinic) -> None:
    async with desk.sink.storing(desk.logging):
        with bind(correlation_id=ID, tenant_id=3, user_id=5):
            log.warning("doorbell_lost", session_id=7, note=f"call {PHONE}")
        await until_stored(clinic, 1)
    row = await clinic.fetchrow("SELECT * FROM log_lines")
    assert row["line"] == desk.path.read_text().rstrip("\n")
    assert "***5678" in row["line"]
    assert PHONE not in row["line"]
    assert abs(row["at"] - datetime.now(UTC)) < timedelta(minutes=1)
    assert {name: value for name, value in row.items() if name not in ("id", "at", "line")} == {
        "level": "warning",
        "urgent": True,
        "event": "doorbell_lost",
        "category": None,
        "component": "chat",
        "service": "test",
        "correlation_id": ID,
        "user_id": 5,
        "session_id": 7,
        "tenant_id": 3,
    }


async def test_what_is_left_at_the_end_is_stored(database: Database, clinic: Clinic, tmp_path: Path) -> None:
    with opened(database, tmp_path) as desk:
        async with desk.sink.storing(desk.logging):
            for number in range(50):
                log.info("counted", number=number)
        log.info("later")
    assert [line["number"] for line in await stored(clinic)] == list(range(50))
    assert desk.not_stored("routine") == desk.not_stored("urgent") == 0


async def test_lines_that_are_not_masked_are_not_stored(
    database: Database, clinic: Clinic, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    with opened(database, tmp_path, path=None, level="DEBUG", unmasked_debug=True) as desk:
        async with desk.sink.storing(desk.logging):
            log.debug("dialled", phone=PHONE)
            log.info("dialled", phone=PHONE)
    assert [line["phone"] for line in await stored(clinic)] == ["***5678"]
    assert PHONE.encode() in capsysbinary.readouterr().out


async def test_warnings_do_not_give_way_to_a_flood_of_others(desk: Desk, clinic: Clinic) -> None:
    number = 3 * sink.ROUTINE_PER_SECOND
    began = time.monotonic()
    async with desk.sink.storing(desk.logging):
        for _ in range(number):
            log.info("routine")
            log.warning("urgent")
    seconds = int(time.monotonic() - began) + 2
    events = [line["event"] for line in await stored(clinic)]
    assert events.count("urgent") == number
    assert sink.ROUTINE_PER_SECOND <= events.count("routine") <= seconds * sink.ROUTINE_PER_SECOND
    assert desk.not_stored("routine") == number - events.count("routine")
    assert desk.not_stored("urgent") == 0
    assert len(lines_of(desk.path)) == 2 * number


async def test_a_database_that_is_away_costs_lines_and_nothing_else(
    urls: Urls, clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(sink, "URGENT_ROOM", 20)
    monkeypatch.setattr(sink, "ROUTINE_ROOM", 10)
    async with wire_to(urls.app) as (wire, address):
        database = Database(address, application="tests", pool_size=2)
        with opened(database, tmp_path) as desk:
            async with desk.sink.storing(desk.logging):
                log.info("before")
                await until_stored(clinic, 1)
                wire.cut()
                for _ in range(50):
                    log.info("routine")
                    log.warning("urgent")

                async def given_up() -> bool:
                    return desk.not_stored("urgent") >= 30 and desk.not_stored("routine") >= 40

                await until(given_up)
                await asyncio.sleep(0.2)  # a few more attempts, of which nothing is said
                wire.state = "whole"
                lines = await until_stored(clinic, 31)
        await database.close()
    assert [line["event"] for line in lines] == ["before"] + ["urgent"] * 20 + ["routine"] * 10
    (complaint,) = [line for line in lines_of(desk.path) if line["event"] == "log_lines_not_stored"]
    assert complaint["exception_type"]
    assert complaint["waiting"] > 0


async def test_the_end_of_a_process_does_not_wait_for_a_database_that_is_away(
    urls: Urls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "STOP_SECONDS", 0.1)
    async with wire_to(urls.app) as (wire, address):
        wire.state = "hanging"
        database = Database(address, application="tests", pool_size=2)
        with opened(database, tmp_path) as desk:
            async with asyncio.timeout(2), desk.sink.storing(desk.logging):
                for _ in range(5):
                    log.info("routine")
                    log.warning("urgent")
        assert (desk.not_stored("routine"), desk.not_stored("urgent")) == (5, 5)
        wire.cut()
        await database.close()


async def test_what_the_database_refuses_does_not_hold_up_the_rest(desk: Desk, clinic: Clinic) -> None:
    async with desk.sink.storing(desk.logging):
        nonsense = {"timestamp": "nonsense", "level": "error", "event": "x", "service": "test"}
        desk.sink(nonsense, b"{}\n")

        async def refused() -> bool:
            return desk.not_stored("urgent") == 1

        await until(refused)
        log.error("next")
        await until_stored(clinic, 1)


@pytest.mark.parametrize("value", ["\x00", "\ud800", 2**80, float("nan"), "\\u0000"], ids=ascii)
async def test_a_line_may_hold_whatever_the_log_holds(desk: Desk, clinic: Clinic, value: object) -> None:
    async with desk.sink.storing(desk.logging):
        with bind(user_id=value, correlation_id=None):
            log.info("odd", value=value)
    (row,) = await clinic.fetch("SELECT line, user_id FROM log_lines")
    assert row["user_id"] is None
    assert row["line"] == desk.path.read_text().rstrip("\n")


async def test_lines_are_forgotten_after_their_time(desk: Desk, clinic: Clinic, clock: Clock) -> None:
    async with desk.sink.storing(desk.logging):
        log.info("routine")
        log.error("urgent")
    await prune(clinic.database, hours=2, lines=10)
    await clock.advance(timedelta(hours=1, minutes=55))
    await prune(clinic.database, hours=2, lines=10)
    assert len(await stored(clinic)) == 2
    await clock.advance(timedelta(minutes=10))
    await prune(clinic.database, hours=2, lines=10)
    assert await stored(clinic) == []


async def test_of_each_kind_the_newest_are_kept_however_many_there_are(
    desk: Desk, clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "PRUNED_AT_ONCE", 8)
    async with desk.sink.storing(desk.logging):
        log.error("urgent", number=0)
        for number in range(30):
            log.info("routine", number=number)
    await prune(clinic.database, hours=1, lines=10)
    lines = await stored(clinic)
    assert [line["number"] for line in lines if line["event"] == "routine"] == list(range(20, 30))
    assert [line["event"] for line in lines].count("urgent") == 1


async def test_workers_that_forget_at_the_same_time_are_not_in_each_others_way(
    desk: Desk, clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    async with desk.sink.storing(desk.logging):
        for _ in range(20):
            log.info("routine")
    async with owner.transaction():
        await owner.execute("SELECT pg_advisory_xact_lock(hashtextextended('log_lines', 0))")
        await prune(clinic.database, hours=1, lines=10)
        assert len(await stored(clinic)) == 20
    await prune(clinic.database, hours=1, lines=10)
    assert len(await stored(clinic)) == 10


async def test_without_hours_nothing_is_stored_and_what_there_was_is_forgotten(
    desk: Desk, clinic: Clinic, clock: Clock
) -> None:
    async with desk.sink.storing(desk.logging):
        log.error("urgent")
    await clock.advance(timedelta(seconds=1))
    await prune(clinic.database, hours=0, lines=10)
    assert await stored(clinic) == []


LINES: list[dict[str, Any]] = [
    {"event": "first", "level": "info", "component": "chat", "user_id": 1, "session_id": 7, "tenant_id": 3},
    {"event": "second", "level": "debug", "component": "outbox", "category": "error"},
    {"event": "second", "level": "warning", "component": "outbox", "category": "error", "correlation_id": ID},
    {"event": "third", "level": "critical", "component": "worker", "user_id": 2},
]


@asynccontextmanager
async def known(desk: Desk) -> AsyncIterator[None]:
    """`LINES`, one an hour, the last of which is an hour old."""
    present = datetime.now(UTC)
    async with desk.sink.storing(desk.logging):
        for number, line in enumerate(LINES):
            moment = (present - timedelta(hours=len(LINES) - number)).isoformat()
            fields = {"timestamp": moment, "service": "test", **line}
            desk.sink(fields, orjson.dumps({"number": number}) + b"\n")
    yield


@pytest.mark.parametrize(
    ("wanted", "limit", "numbers"),
    [
        (Wanted(), 100, [0, 1, 2, 3]),
        (Wanted(), 2, [2, 3]),
        (Wanted(level="debug"), 100, [0, 1, 2, 3]),
        (Wanted(level="info"), 100, [0, 2, 3]),
        (Wanted(level="warning"), 100, [2, 3]),
        (Wanted(level="error"), 100, [3]),
        (Wanted(component="outbox"), 100, [1, 2]),
        (Wanted(category="error", level="warning"), 100, [2]),
        (Wanted(event="second"), 1, [2]),
        (Wanted(correlation_id=ID), 100, [2]),
        (Wanted(user_id=1), 100, [0]),
        (Wanted(session_id=7), 100, [0]),
        (Wanted(tenant_id=4), 100, []),
        (Wanted(since=timedelta(hours=2, minutes=30)), 100, [2, 3]),
        (Wanted(until=timedelta(hours=2, minutes=30)), 100, [0, 1]),
        (Wanted(since=datetime(2020, 1, 1, tzinfo=UTC), until=datetime(2021, 1, 1, tzinfo=UTC)), 100, []),
    ],
)
async def test_lines_are_searched_by_what_they_are_about_and_answered_in_their_order(
    desk: Desk, database: Database, wanted: Wanted, limit: int, numbers: list[int]
) -> None:
    async with known(desk), database.begin() as connection:
        found = await search.search(connection, wanted, limit=limit)
        assert [orjson.loads(line)["number"] for line in found] == numbers
        if limit == 100:
            assert sum(each.lines for each in await count(connection, wanted)) == len(numbers)


async def test_lines_are_counted_by_level_and_event(desk: Desk, database: Database) -> None:
    async with known(desk), known(desk), database.begin() as connection:
        counts = await count(connection, Wanted(component="outbox"))
        assert [(each.level, each.event, each.category, each.lines) for each in counts] == [
            ("debug", "second", "error", 2),
            ("warning", "second", "error", 2),
        ]
