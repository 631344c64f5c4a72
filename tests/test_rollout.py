"""The rollout as operators go through it: watch, enforce one flag after the other, and back, on running processes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from libs.domain.flags.overrides import CHANNEL
from libs.guardrails import Flag
from tests.api.calls import Owner
from tests.api.legacy import WAYS
from tests.cli.conftest import sessiongate
from tests.clinic import Clinic, LiveSession
from tests.conftest import MakeApi, Urls
from tests.processes import Worker, running_worker, until
from tests.running import Api

CHAT = Flag.ENFORCE_SESSION_GATED_CHAT
BILLING = Flag.ENFORCE_SESSION_GATED_BILLING
TRIGGERS = Flag.DISABLE_LEGACY_APPOINTMENT_TRIGGERS
LENIENT = Flag.ALLOW_LEGACY_APPOINTMENT_CHAT

EFFECT_SECONDS = 2.0

# What is on after each step. The environment has the last flag on, for clients that chat before the session begins.
PHASE_1 = {LENIENT}
STEPS: tuple[tuple[Flag, bool, set[Flag]], ...] = (
    (CHAT, True, {CHAT, LENIENT}),
    (BILLING, True, {CHAT, BILLING, LENIENT}),
    (TRIGGERS, True, {CHAT, BILLING, TRIGGERS, LENIENT}),
    (LENIENT, False, {CHAT, BILLING, TRIGGERS}),
)


@dataclass(frozen=True)
class Fleet:
    """Two API processes and a worker, and two conversations to try them with."""

    apis: list[Api]
    worker: Worker
    begun: LiveSession
    early: int
    clinic: Clinic

    async def is_at(self, on: set[Flag]) -> bool:
        """Whether every process acts, and reports, as if exactly these flags were on."""
        for api in self.apis:
            client = api.as_(self.begun.patient)
            by_appointment = await client.get(f"/chat/{self.begun.appointment_id}/messages")
            too_early = await client.get(f"/chat/{self.early}/messages")
            answers = (by_appointment.status_code, too_early.status_code)
            if answers != (400 if CHAT in on else 200, 200 if LENIENT in on else 403):
                return False
            gauges = {flag for flag in Flag if api.runtime.metrics.sample("feature_flag_enabled", flag=flag.value)}
            if gauges != on:
                return False
        reported = {flag for flag in Flag if await self.worker.sample("feature_flag_enabled", flag=flag.value)}
        return reported == on

    async def comes_to(self, on: set[Flag]) -> None:
        """Waits until it is so; then billing and the legacy commands follow as well."""
        await until(lambda: self.is_at(on), EFFECT_SECONDS)
        for api in self.apis:
            billed = await WAYS["process-payment"][1](api, self.begun.patient, self.begun.appointment_id)
            assert billed.status_code == (400 if BILLING in on else 200)
            run = await self.clinic.triggers(api.runtime.flags).process_appointment_sessions()
            assert run.disabled == (TRIGGERS in on)


@pytest.fixture
async def fleet(make_api: MakeApi, clinic: Clinic, urls: Urls, tmp_path: Path) -> AsyncIterator[Fleet]:
    apis = [await make_api(ALLOW_LEGACY_APPOINTMENT_CHAT=True) for _ in range(2)]
    begun = await clinic.session()
    await clinic.begin(begun)
    early = await clinic.appointment(patient=begun.patient, starts_in=timedelta(hours=1))
    environment = {LENIENT.value: "true"}
    async with running_worker(urls.app, urls.redis, tmp_path / "worker.jsonl", **environment) as worker:
        yield Fleet(apis, worker, begun, early, clinic)


@pytest.fixture
def run(urls: Urls, tmp_path: Path) -> Callable[..., Awaitable[str]]:
    """Runs `sessiongate flags` while the servers of this process go on."""
    known = {"SESSIONGATE_HOME": str(tmp_path), "SESSIONGATE_DATABASE_URL": urls.app, LENIENT.value: "true"}

    async def run(*arguments: str) -> str:
        done = await asyncio.to_thread(sessiongate, tmp_path, "flags", *arguments, env=known)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


async def kill_listeners(owner: Owner) -> None:
    killed = await owner.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name LIKE 'sessiongate-% flags' AND datname = current_database()"
    )
    assert killed == 3


async def listening(owner: Owner) -> bool:
    return bool(
        await owner.fetchval(
            "SELECT count(*) = 3 FROM pg_stat_activity"
            " WHERE application_name LIKE 'sessiongate-% flags' AND datname = current_database()"
        )
    )


async def test_the_three_phases_and_the_rollback(fleet: Fleet, run: Callable[..., Awaitable[str]]) -> None:
    await fleet.comes_to(PHASE_1)
    for flag, on, expected in STEPS:
        await run("set", flag, "on" if on else "off")
        await fleet.comes_to(expected)
    said = await run("rollback", "--yes")
    assert f"{LENIENT} is now on, as the environment says." in said
    await fleet.comes_to(PHASE_1)


async def write(owner: Owner, flag: Flag, on: bool) -> None:
    """The row alone: nobody is told."""
    target = '{"default": true}' if on else '{"default": false}'
    await owner.execute("INSERT INTO flag_overrides (flag, target) VALUES ($1, $2)", flag, target)


async def test_a_phase_counts_although_every_listener_was_killed(fleet: Fleet, owner: Owner) -> None:
    for flag, on, expected in STEPS:
        await until(lambda: listening(owner))
        await kill_listeners(owner)
        await write(owner, flag, on)
        await owner.execute(f"NOTIFY {CHANNEL}")
        await fleet.comes_to(expected)


async def test_a_phase_counts_although_nobody_was_told(fleet: Fleet, owner: Owner) -> None:
    for flag, on, expected in STEPS:
        await write(owner, flag, on)
        await fleet.comes_to(expected)
    await owner.execute("DELETE FROM flag_overrides")
    await fleet.comes_to(PHASE_1)


async def test_a_tripwire_ends_a_phase_in_every_process(fleet: Fleet, run: Callable[..., Awaitable[str]]) -> None:
    await run("set", CHAT, "on", "--tripwire", "0.1:5:20")
    await fleet.comes_to({CHAT, LENIENT})
    for api in fleet.apis:
        for _ in range(10):
            await api.as_(fleet.begun.patient).get(f"/chat/{fleet.begun.appointment_id}/messages")
    await until(lambda: fleet.is_at(PHASE_1))
    assert await fleet.worker.sample("flag_tripwire_total", flag=CHAT.value) == 1
    assert [line["flag"] for line in fleet.worker.lines("flag_tripped")] == [CHAT]
    assert "tripwire" in await run("history", CHAT)
