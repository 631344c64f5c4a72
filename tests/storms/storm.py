"""A storm over conversion: appointments become due while workers are killed, connections cut and Redis emptied."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import asyncpg
from redis.asyncio import Redis

from libs.domain.invariants import audit
from tests.conftest import Urls
from tests.population import populate
from tests.processes import until
from tests.storms import workers

WORKERS: Final = 3
BATCH_LIMIT: Final = 20
CALM_SECONDS: Final = 60.0
"""Within which three workers that are left alone finish what the storm left behind."""


@dataclass(frozen=True)
class Scale:
    """How many appointments become due evenly over how many seconds, and how many workers are killed meanwhile."""

    appointments: int
    seconds: float
    kills: int


@dataclass
class Weather:
    """What the storm did."""

    kills: int = 0
    cut_connections: int = 0
    cut_transactions: int = 0
    emptied_redis: int = 0


@dataclass
class Storm:
    """One storm over the database of `urls`."""

    urls: Urls
    folder: Path
    scale: Scale
    reckless: bool = False
    weather: Weather = field(default_factory=Weather)

    async def rage(self, owner: "asyncpg.Connection[Any]") -> None:
        """Populates, storms, and lets three workers finish in calm. Gives up on them after `CALM_SECONDS`."""
        self._logs = 0
        async with self._crew() as crew:
            await until(lambda: _all_started(crew))
            due = await owner.fetchval("SELECT clock() + interval '2 seconds'")
            await populate(owner, self.scale.appointments, due, apart=self.scale.seconds / self.scale.appointments)
            await owner.execute(_BREAK)
            await owner.execute("ANALYZE")
            await asyncio.gather(self._kill(crew), self._cut(owner), self._empty_redis())
            await until(lambda: _all_started(crew))
            with suppress(TimeoutError):
                await until(lambda: self._everything_is_attempted(owner), CALM_SECONDS)
                # What a killed worker had leased is free again once its lease has ended.
                await owner.execute("UPDATE test_clock SET ahead = ahead + $1", timedelta(seconds=31))
                await until(lambda: owner.fetchval(_NOTHING_PENDING), CALM_SECONDS)

    @asynccontextmanager
    async def _crew(self) -> AsyncIterator[dict[BaseProcess, Path]]:
        crew: dict[BaseProcess, Path] = {}
        for _ in range(WORKERS):
            self._enlist(crew)
        try:
            yield crew
        finally:
            for process in crew:
                process.terminate()
            for process in crew:
                await asyncio.to_thread(process.join)
        assert {process.exitcode for process in crew} == {0}

    def _enlist(self, crew: dict[BaseProcess, Path]) -> None:
        self._logs += 1
        log = self.folder / f"worker-{self._logs}.jsonl"
        settings = {
            "SESSIONGATE_DATABASE_URL": self.urls.app,
            "SESSIONGATE_REDIS_URL": self.urls.redis,
            "SESSIONGATE_WORKER_METRICS_PORT": "0",
            "SESSIONGATE_CONVERSION_BATCH_LIMIT": str(BATCH_LIMIT),
        }
        crew[workers.start(settings, log, reckless=self.reckless)] = log

    async def _kill(self, crew: dict[BaseProcess, Path]) -> None:
        """Kills workers that have started, at random moments; each is replaced at once."""
        pause = (2 + self.scale.seconds) / self.scale.kills
        while self.weather.kills < self.scale.kills:
            await asyncio.sleep(random.uniform(0, 2 * pause))
            started = [process for process, log in crew.items() if workers.has_started(log)]
            if started:
                victim = random.choice(started)
                victim.kill()
                await asyncio.to_thread(victim.join)
                del crew[victim]
                self.weather.kills += 1
                self._enlist(crew)

    async def _cut(self, owner: "asyncpg.Connection[Any]") -> None:
        """Terminates connections of workers, those in the middle of a transaction first."""
        while self.weather.kills < self.scale.kills:
            await asyncio.sleep(random.uniform(0, 0.5))
            cut = await owner.fetchrow(_CUT)
            if cut is not None:
                self.weather.cut_connections += 1
                self.weather.cut_transactions += cut["in_transaction"]

    async def _empty_redis(self) -> None:
        async with Redis.from_url(self.urls.redis) as connection:
            while self.weather.kills < self.scale.kills:
                await asyncio.sleep(random.uniform(0, 1.0))
                keys = await connection.keys()
                if keys:
                    await connection.unlink(*keys)
                self.weather.emptied_redis += 1

    async def _everything_is_attempted(self, owner: "asyncpg.Connection[Any]") -> bool:
        return bool(await owner.fetchval(_EVERYTHING_ATTEMPTED))


async def _all_started(crew: dict[BaseProcess, Path]) -> bool:
    return all(workers.has_started(log) for log in crew.values())


# One in a hundred is broken, in five ways that take turns.
_BREAK: Final = """
    CREATE TABLE broken AS
    SELECT id AS appointment_id, patient_id, doctor_id,
        (ARRAY['patient', 'doctor', 'subscription', 'units', 'database'])[1 + (id / 100) % 5] AS what
    FROM appointments WHERE id % 100 = 50;
    CREATE TABLE expected (what text, reason text);
    INSERT INTO expected VALUES
        ('patient', 'missing_doctor_or_patient'), ('doctor', 'missing_doctor_or_patient'),
        ('subscription', 'missing_doctor_or_patient'), ('units', 'createSession_validation_failed'),
        ('database', 'unknown_error');
    UPDATE users SET active = false WHERE id IN (SELECT patient_id FROM broken WHERE what = 'patient');
    UPDATE users SET active = false WHERE id IN (SELECT doctor_id FROM broken WHERE what = 'doctor');
    DELETE FROM subscriptions WHERE patient_id IN (SELECT patient_id FROM broken WHERE what = 'subscription');
    UPDATE subscriptions SET text_sessions_remaining = 0, voice_calls_remaining = 0, video_calls_remaining = 0,
        text_sessions_granted = 0, voice_calls_granted = 0, video_calls_granted = 0
        WHERE patient_id IN (SELECT patient_id FROM broken WHERE what = 'units');
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
        IF EXISTS (SELECT FROM broken b WHERE b.appointment_id = NEW.appointment_id AND b.what = 'database') THEN
            RAISE EXCEPTION 'The disk said no.';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION refuse();
"""

_CUT: Final = """
    SELECT in_transaction FROM (
        SELECT pg_terminate_backend(pid), in_transaction FROM (
            SELECT pid, coalesce(state, 'idle') <> 'idle' AS in_transaction FROM pg_stat_activity
            WHERE datname = current_database() AND application_name = 'sessiongate-worker'
            ORDER BY 2 DESC, random() LIMIT 1
        ) AS victim
    ) AS cut
"""

_EVERYTHING_ATTEMPTED: Final = """
    SELECT NOT EXISTS (
        SELECT FROM appointments a WHERE session_id IS NULL
            AND NOT EXISTS (SELECT FROM conversion_attempts c WHERE c.appointment_id = a.id)
    ) AND NOT EXISTS (SELECT FROM appointments WHERE starts_at > clock())
"""

_NOTHING_PENDING: Final = """
    SELECT NOT EXISTS (SELECT FROM outbox_deliveries WHERE dispatched_at IS NULL AND dead_at IS NULL)
"""

FAULTS: Final = {
    "sessions missing": """
        SELECT id FROM appointments a
        WHERE id NOT IN (SELECT appointment_id FROM broken)
          AND NOT EXISTS (SELECT FROM sessions s WHERE s.appointment_id = a.id)
    """,
    "sessions of broken appointments": """
        SELECT id FROM sessions WHERE appointment_id IN (SELECT appointment_id FROM broken)
    """,
    "sessions without their full time": """
        SELECT s.id FROM sessions s JOIN appointments a ON a.id = s.appointment_id
        WHERE s.created_at < a.starts_at OR s.expires_at < greatest(a.ends_at, s.created_at + (a.ends_at - a.starts_at))
    """,
    "appointments converted other than by one attempt": """
        SELECT a.id FROM appointments a
        LEFT JOIN conversion_attempts c ON c.appointment_id = a.id AND c.result = 'created'
        WHERE a.session_id IS NOT NULL
        GROUP BY a.id HAVING array_agg(c.session_id) <> ARRAY[a.session_id]
    """,
    "broken ones without their reason": """
        SELECT b.appointment_id FROM broken b JOIN expected e USING (what)
        WHERE (SELECT array_agg(DISTINCT c.result || ' ' || c.reason) FROM conversion_attempts c
               WHERE c.appointment_id = b.appointment_id) IS DISTINCT FROM ARRAY['failed ' || e.reason]
    """,
    "broken ones without a next attempt": """
        SELECT a.id FROM appointments a JOIN broken b ON b.appointment_id = a.id
        WHERE a.status <> 'CONFIRMED' OR a.session_id IS NOT NULL OR a.next_attempt_at IS NULL
           OR a.conversion_failures <> (SELECT count(*) FROM conversion_attempts c WHERE c.appointment_id = a.id)
    """,
    "sessions without a conversation of two": """
        SELECT s.id FROM sessions s
        LEFT JOIN conversations c ON c.session_id = s.id LEFT JOIN participants p ON p.conversation_id = c.id
        GROUP BY s.id HAVING array_agg(p.user_id ORDER BY p.role DESC) <> ARRAY[s.patient_id, s.doctor_id]
    """,
    "sessions whose parties were not told once each": """
        SELECT s.id FROM sessions s LEFT JOIN notifications n ON n.session_id = s.id AND n.kind = 'session_started'
        GROUP BY s.id
        HAVING array_agg(n.user_id ORDER BY n.user_id = s.doctor_id) IS DISTINCT FROM ARRAY[s.patient_id, s.doctor_id]
    """,
    "runs whose rows count other than the attempts": """
        SELECT 1 WHERE (SELECT (coalesce(sum(created_count), 0), coalesce(sum(failed_count), 0)) FROM conversion_runs)
            <> (SELECT (count(*) FILTER (WHERE result = 'created'), count(*) FILTER (WHERE result = 'failed'))
                FROM conversion_attempts)
    """,
}
"""What must not be found after this storm, besides what never must: each query names the rows that are wrong."""


async def faults(owner: "asyncpg.Connection[Any]") -> dict[str, int]:
    """How many rows violate an invariant or are found by one of `FAULTS`, where there are any."""
    found = {finding.invariant.name: finding.violations for finding in (await audit(owner)).findings}
    found |= {name: len(await owner.fetch(sql)) for name, sql in FAULTS.items()}
    return {name: number for name, number in found.items() if number}
