"""Whoever ends, ticks and bills at once, and whatever dies meanwhile: each unit is charged and paid once."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx2
import pytest

from libs.domain.conversion.runs import Converter
from libs.domain.db import Database
from libs.domain.invariants import violations
from libs.guardrails import Principal, Role
from tests.conftest import Urls
from tests.population import populate
from tests.running import client_of, token_of
from tests.storms import workers
from tests.storms.apis import bill_without_locks, running_process

CALM_SECONDS: Final = 60.0
WORKERS: Final = 2
MINUTES: Final = 25
UNITS: Final = 3
"""Two whole ones, and one for whoever ends the session."""


@dataclass(frozen=True)
class Scale:
    """How many sessions, how many calls on each at once, and how many workers are killed meanwhile."""

    sessions: int
    calls: int
    kills: int


LONG = Scale(sessions=200, calls=50, kills=20)
SHORT = Scale(sessions=30, calls=20, kills=3)

# As after the doctor's answer 25 minutes ago, of which nothing was charged yet: the workers begin at once.
_BEGIN: Final = f"""
    UPDATE sessions SET status = 'active', activated_at = clock() - interval '{MINUTES} minutes',
        connected_at = CASE kind WHEN 'call' THEN clock() - interval '{MINUTES} minutes' END, allowance_units = 10,
        expires_at = clock() - interval '{MINUTES} minutes' + interval '100 minutes', tick_at = clock()
"""
_CUT: Final = """
    SELECT count(pg_terminate_backend(pid)) FROM (
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND application_name IN ('sessiongate-worker', 'sessiongate-api')
        ORDER BY coalesce(state, 'idle') <> 'idle' DESC, random() LIMIT 1
    ) AS victim
"""
_WRONG: Final = f"""
    SELECT s.id, s.status, s.units_charged, t.units, e.subscription, e.wallet
    FROM sessions s
    LEFT JOIN LATERAL (
        SELECT count(*) AS units FROM ledger_transactions WHERE session_id = s.id AND kind = 'charge'
    ) AS t ON true
    LEFT JOIN LATERAL (
        SELECT sum(amount) FILTER (WHERE account = 'subscription') AS subscription,
            sum(amount) FILTER (WHERE account = 'wallet') AS wallet
        FROM ledger_entries WHERE transaction_id IN (SELECT id FROM ledger_transactions WHERE session_id = s.id)
    ) AS e ON true
    WHERE (s.status, s.units_charged, t.units, e.subscription, e.wallet)
        IS DISTINCT FROM ('ended', {UNITS}, {UNITS}, -{UNITS}, {UNITS} * 350000)
"""


@dataclass(frozen=True)
class Session:
    """A session that runs, its appointment and who takes part in it."""

    context: str
    appointment_id: int
    parties: tuple[Principal, Principal]


@dataclass
class Storm:
    urls: Urls
    folder: Path
    scale: Scale
    reckless: bool = False
    kills: int = 0
    cuts: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    failures: int = 0

    async def rage(self, owner: "asyncpg.Connection[Any]") -> None:
        """Bills every session in every way at once, while workers are killed and connections cut."""
        sessions = await self._begin(owner)
        sabotage = bill_without_locks if self.reckless else None
        async with AsyncExitStack() as stack:
            ports = [
                await stack.enter_async_context(
                    running_process(self.urls.app, self.urls.redis, self.folder / f"api-{n}.jsonl", sabotage)
                )
                for n in range(2)
            ]
            clients = [await stack.enter_async_context(client_of(f"http://127.0.0.1:{port}")) for port in ports]
            await stack.enter_async_context(self._crew())
            cutting = asyncio.create_task(self._cut(owner))
            try:
                # Some sessions at a time, so that the calls on each of them meet.
                for start in range(0, len(sessions), 10):
                    await asyncio.gather(*(self._bill(clients, each) for each in sessions[start : start + 10]))
            finally:
                cutting.cancel()

    async def _begin(self, owner: "asyncpg.Connection[Any]") -> Sequence[Session]:
        await populate(owner, self.scale.sessions, datetime.now(UTC) - timedelta(minutes=30))
        database = Database(self.urls.app, application="storm")
        await Converter(database, lambda *_: None, worker="storm", counts=False).auto_start(wait=True)
        await database.close()
        await owner.execute(_BEGIN)
        rows = await owner.fetch("SELECT *, kind || '_session:' || id AS context FROM sessions ORDER BY id")
        return [
            Session(
                row["context"],
                row["appointment_id"],
                (
                    Principal(row["patient_id"], row["tenant_id"], Role.PATIENT),
                    Principal(row["doctor_id"], row["tenant_id"], Role.DOCTOR),
                ),
            )
            for row in rows
        ]

    async def _bill(self, clients: Sequence[httpx2.AsyncClient], session: Session) -> None:
        calls = [
            (f"/api/v1/sessions/{session.context}/end", None),
            (f"/api/v1/sessions/{session.context}/deductions", None),
            (f"/api/appointments/{session.appointment_id}/end-session", None),
            (f"/api/appointments/{session.appointment_id}/process-payment", None),
            *(
                (
                    "/api/text-appointments/process-deduction",
                    {"appointment_id": session.appointment_id, "sessions_to_deduct": 9, "reason": reason},
                )
                for reason in ("interval", "manual_end", "no_activity")
            ),
        ]
        wanted = [calls[n % len(calls)] for n in range(self.scale.calls)]
        random.shuffle(wanted)
        await asyncio.gather(*(self._insist(random.choice(clients), session, *call) for call in wanted))

    async def _insist(
        self, client: httpx2.AsyncClient, session: Session, path: str, body: dict[str, Any] | None
    ) -> None:
        """Asks until there is an answer: a request that found no database may be sent again."""
        headers = {"Authorization": f"Bearer {token_of(random.choice(session.parties))}"}
        async with asyncio.timeout(CALM_SECONDS):
            while True:
                try:
                    answer = await client.post(path, json=body, headers=headers)
                except httpx2.TransportError:
                    self.failures += 1
                else:
                    self.answers[answer.status_code] += 1
                    if answer.status_code in (200, 409):
                        return
                await asyncio.sleep(random.uniform(0, 0.2))

    @asynccontextmanager
    async def _crew(self) -> AsyncIterator[None]:
        """Workers, of which now and then one is killed and replaced."""
        crew: dict[BaseProcess, Path] = {}
        for n in range(WORKERS):
            self._enlist(crew, n)
        killing = asyncio.create_task(self._kill(crew))
        try:
            yield
            async with asyncio.timeout(CALM_SECONDS):
                await killing
        finally:
            killing.cancel()
            for process in crew:
                process.terminate()
            for process in crew:
                await asyncio.to_thread(process.join)

    def _enlist(self, crew: dict[BaseProcess, Path], number: int) -> None:
        log = self.folder / f"worker-{number}.jsonl"
        settings = {
            "SESSIONGATE_DATABASE_URL": self.urls.app,
            "SESSIONGATE_REDIS_URL": self.urls.redis,
            "SESSIONGATE_WORKER_METRICS_PORT": "0",
        }
        crew[workers.start(settings, log, reckless=self.reckless)] = log

    async def _kill(self, crew: dict[BaseProcess, Path]) -> None:
        while self.kills < self.scale.kills:
            await asyncio.sleep(random.uniform(0, 0.4))
            started = [process for process, log in crew.items() if workers.has_started(log)]
            if started:
                victim = random.choice(started)
                victim.kill()
                await asyncio.to_thread(victim.join)
                del crew[victim]
                self.kills += 1
                self._enlist(crew, WORKERS + self.kills)

    async def _cut(self, owner: "asyncpg.Connection[Any]") -> None:
        while True:
            await asyncio.sleep(random.uniform(0, 0.3))
            self.cuts += await owner.fetchval(_CUT)


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    return LONG if request.config.getoption("--storm") == "full" else SHORT


async def test_each_unit_is_charged_and_paid_once(
    urls: Urls, owner: "asyncpg.Connection[Any]", tmp_path: Path, scale: Scale
) -> None:
    storm = Storm(urls, tmp_path, scale)
    await storm.rage(owner)
    print(storm)
    assert await owner.fetch(_WRONG) == []
    assert await violations(owner) == {}
    assert storm.kills == scale.kills
    assert storm.cuts > 0
    assert storm.answers.keys() <= {200, 409, 503}
    assert storm.answers[200] + storm.answers[409] == scale.sessions * scale.calls


async def test_the_storm_finds_charges_without_locks_and_keys(
    urls: Urls, owner: "asyncpg.Connection[Any]", tmp_path: Path
) -> None:
    await owner.execute("ALTER TABLE ledger_transactions DROP CONSTRAINT ledger_transactions_idempotency_key_key")
    storm = Storm(urls, tmp_path, SHORT, reckless=True)
    await storm.rage(owner)
    assert await owner.fetch(_WRONG) != []
