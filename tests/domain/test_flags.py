"""Overrides as rows, and how a process follows them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from libs.domain.catalogue import CATALOGUE
from libs.domain.db import Database
from libs.domain.flags import overrides
from libs.domain.flags.live import LiveFlags
from libs.domain.transaction import Transaction, transaction
from libs.guardrails import Flag, Flags, Override, Principal, Target, Tripwire
from libs.observability.registry import Metrics
from libs.observability.testing import capture_logs
from tests.api.calls import Owner
from tests.clinic import Clinic
from tests.conftest import Urls
from tests.processes import until

CHAT = Flag.ENFORCE_SESSION_GATED_CHAT
BILLING = Flag.ENFORCE_SESSION_GATED_BILLING
EFFECT_SECONDS = 2.0
"""How soon a change counts in every process."""


async def put(clinic: Clinic, override: Override, actor: Principal | None = None) -> Override | None:
    async with transaction(clinic.database, clinic.bell) as tx:
        return await overrides.put(tx, override, actor)


async def audited(clinic: Clinic) -> list[tuple[Any, ...]]:
    rows = await clinic.fetch("SELECT tenant_id, actor_id, action, subject, details FROM audit_log ORDER BY id")
    return [tuple(row) for row in rows]


def live_flags(database: Database, **environment: bool) -> LiveFlags:
    metrics = Metrics(CATALOGUE, version="test", service="tests")
    return LiveFlags(Flags(**environment), database=database, metrics=metrics)


@pytest.fixture
async def live(database: Database) -> AsyncIterator[LiveFlags]:
    flags = live_flags(database)
    async with flags.following():
        yield flags


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    """What happens in here must not take longer than a change may."""
    async with asyncio.timeout(EFFECT_SECONDS):
        yield


async def becomes(flags: LiveFlags, tenant_id: int, expected: bool, flag: Flag = CHAT) -> None:
    async def as_expected() -> bool:
        return flags.for_tenant(tenant_id)[flag] is expected

    await until(as_expected, EFFECT_SECONDS)


# Rows


async def test_what_is_put_is_read_back_and_replaces_what_was_there(clinic: Clinic) -> None:
    first = Override(CHAT, None, Target(None, 0.25, {"tenant": frozenset({clinic.tenant_id})}), Tripwire(0.2, 3, 10))
    second = Override(CHAT, None, Target(True))
    own = Override(CHAT, clinic.tenant_id, Target(False))
    assert await put(clinic, first) is None
    assert await put(clinic, own) is None
    async with clinic.database.autocommit() as connection:
        assert await overrides.read(connection) == [first, own]
    assert await put(clinic, second) == first
    async with transaction(clinic.database, clinic.bell) as tx:
        assert await overrides.all_of(tx) == [second, own]


async def test_every_change_is_audited_with_before_and_after(clinic: Clinic) -> None:
    everyone = Override(CHAT, None, Target(True), Tripwire())
    own = Override(BILLING, clinic.tenant_id, Target(True))
    await put(clinic, everyone)
    await put(clinic, own, clinic.operator)
    async with transaction(clinic.database, clinic.bell) as tx:
        await overrides.clear(tx)

    on: dict[str, Any] = {"target": {"default": True, "share": None, "allow": {}}, "tripwire": None}
    wired = on | {"tripwire": {"share": 0.1, "minutes": 5, "minimum": 50}}
    chat, billing = f"flag:{CHAT}", f"flag:{BILLING}"
    told = await audited(clinic)
    assert told[:2] == [
        (None, None, "flag_changed", chat, {"before": None, "after": wired}),
        (clinic.tenant_id, clinic.operator.user_id, "flag_changed", billing, {"before": None, "after": on}),
    ]
    assert sorted(told[2:], key=lambda row: row[3], reverse=True) == [
        (None, None, "flag_cleared", chat, {"before": wired, "after": None}),
        (clinic.tenant_id, None, "flag_cleared", billing, {"before": on, "after": None}),
    ]


async def test_simultaneous_changes_tell_a_story_without_gaps(clinic: Clinic) -> None:
    shares = [number / 20 for number in range(20)]
    await asyncio.gather(*(put(clinic, Override(CHAT, None, Target(share=share))) for share in shares))
    changes = [details for *_, details in await audited(clinic)]
    assert len(changes) == 20
    assert [change["before"] for change in changes] == [None, *(change["after"] for change in changes[:-1])]


async def test_a_change_that_is_rolled_back_leaves_nothing_and_is_not_told(clinic: Clinic, owner: Owner) -> None:
    heard: list[Any] = []
    await owner.add_listener(overrides.CHANNEL, lambda *heard_now: heard.append(heard_now))
    tx = Transaction(clinic.database)
    await overrides.put(tx, Override(CHAT, None, Target(True)), None)
    await tx.close()
    await put(clinic, Override(BILLING, None, Target(True)))

    async def told() -> bool:
        await owner.fetchval("SELECT 1")
        return bool(heard)

    await until(told)
    assert len(heard) == 1
    assert [subject for *_, subject, _ in await audited(clinic)] == [f"flag:{BILLING}"]


async def test_clearing_can_be_confined_to_a_flag_or_a_tenant(clinic: Clinic) -> None:
    everyone, own = Override(CHAT, None, Target(True)), Override(CHAT, clinic.tenant_id, Target(False))
    other = Override(BILLING, clinic.tenant_id, Target(True))
    for override in (everyone, own, other):
        await put(clinic, override)
    async with transaction(clinic.database, clinic.bell) as tx:
        assert await overrides.clear(tx, BILLING) == [other]
        assert await overrides.clear(tx, BILLING) == []
        assert await overrides.clear(tx, None, clinic.tenant_id) == [own]
        assert await overrides.all_of(tx) == [everyone]


async def test_a_flag_of_another_version_is_left_to_it(clinic: Clinic, owner: Owner) -> None:
    await owner.execute("INSERT INTO flag_overrides (flag, target) VALUES ('OF_ANOTHER_VERSION', '7')")
    await put(clinic, Override(CHAT, None, Target(True)))
    async with transaction(clinic.database, clinic.bell) as tx:
        assert len(await overrides.all_of(tx)) == len(await overrides.clear(tx)) == 1
    assert await clinic.fetchval("SELECT flag FROM flag_overrides") == "OF_ANOTHER_VERSION"


# Following


async def test_overrides_count_from_the_first_moment_of_a_process(clinic: Clinic, live: LiveFlags) -> None:
    await put(clinic, Override(CHAT, None, Target(True)))
    late = live_flags(clinic.database)
    assert not late.for_tenant(clinic.tenant_id)[CHAT]
    async with late.following():
        assert late.for_tenant(clinic.tenant_id)[CHAT]


async def test_a_change_is_heard_at_once(clinic: Clinic, live: LiveFlags) -> None:
    before = asyncio.get_running_loop().time()
    await put(clinic, Override(CHAT, clinic.tenant_id, Target(True)))
    await becomes(live, clinic.tenant_id, True)
    assert asyncio.get_running_loop().time() - before < 0.5  # long before the next look
    assert not live.for_tenant(clinic.tenant_id + 1)[CHAT]


async def test_a_change_nobody_announced_is_found(clinic: Clinic, live: LiveFlags, owner: Owner) -> None:
    await owner.execute("INSERT INTO flag_overrides (flag, target) VALUES ($1, '{\"default\": true}')", CHAT)
    await becomes(live, clinic.tenant_id, True)
    await owner.execute("DELETE FROM flag_overrides")
    await becomes(live, clinic.tenant_id, False)


async def test_a_listener_that_was_killed_listens_again(clinic: Clinic, live: LiveFlags, owner: Owner) -> None:
    for expected in (True, False, True):
        assert await listeners(owner, "count(pg_terminate_backend(pid))") == 1
        await put(clinic, Override(CHAT, None, Target(expected)))
        await becomes(live, clinic.tenant_id, expected)

        async def listening() -> bool:
            return await listeners(owner, "count(*)") == 1

        await until(listening)


async def listeners(owner: Owner, what: str) -> int:
    """Of this test's database, on connections of their own."""
    return int(
        await owner.fetchval(
            f"SELECT {what} FROM pg_stat_activity"
            " WHERE application_name = 'tests flags' AND datname = current_database()"
        )
    )


async def test_without_its_database_a_process_keeps_the_last_values(
    clinic: Clinic, live: LiveFlags, owner: Owner, urls: Urls
) -> None:
    await put(clinic, Override(CHAT, None, Target(True)))
    await becomes(live, clinic.tenant_id, True)
    name = await owner.fetchval("SELECT current_database()")
    elsewhere = await asyncpg.connect(urls.owner.replace(f"/{name}?", "/postgres?"))
    try:
        with capture_logs() as logs:
            await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            await listeners(owner, "count(pg_terminate_backend(pid))")
            await owner.execute("DELETE FROM flag_overrides")

            async def lost() -> bool:
                return bool(logs.lines("flags_not_followed"))

            await until(lost)
            await asyncio.sleep(1.2)  # longer than it takes to look again
            assert live.for_tenant(clinic.tenant_id)[CHAT]
            assert len(logs.lines("flags_not_followed")) == 1
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await becomes(live, clinic.tenant_id, False)
    finally:
        await elsewhere.close()


async def test_a_process_that_starts_without_a_database_has_the_flags_of_its_environment() -> None:
    nowhere = Database("postgresql://nobody@/nothing?host=/nowhere", application="tests", pool_size=1)
    flags = live_flags(nowhere, enforce_session_gated_chat=True)
    async with in_time(), flags.following():
        assert flags.for_tenant(1) == Flags(enforce_session_gated_chat=True)
    await nowhere.close()


class Late:
    """A connection whose answer is held back."""

    def __init__(self, connection: "asyncpg.Connection[Any]") -> None:
        self._connection = connection
        self.has_read = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def fetch(self, *arguments: Any, **options: Any) -> Any:
        rows = await self._connection.fetch(*arguments, **options)
        self.has_read.set()
        await self.may_answer.wait()
        return rows


async def test_what_was_read_before_a_change_does_not_undo_it(clinic: Clinic, owner: Owner) -> None:
    flags = live_flags(clinic.database)
    late: Any = Late(owner)
    async with in_time(), asyncio.TaskGroup() as tasks:
        tasks.create_task(flags._read(late))
        await late.has_read.wait()
        await put(clinic, Override(CHAT, None, Target(True)))
        reloading = tasks.create_task(flags.reload())
        await asyncio.wait([reloading], timeout=0.2)
        late.may_answer.set()
    assert flags.for_tenant(clinic.tenant_id)[CHAT]


async def test_a_row_that_cannot_be_read_changes_nothing(clinic: Clinic, live: LiveFlags, owner: Owner) -> None:
    await put(clinic, Override(CHAT, None, Target(True)))
    await becomes(live, clinic.tenant_id, True)
    with capture_logs() as logs:
        await owner.execute("INSERT INTO flag_overrides (flag, target) VALUES ('OF_ANOTHER_VERSION', '7')")
        await owner.execute("UPDATE flag_overrides SET target = '{\"share\": 7}' WHERE flag = $1", CHAT)

        async def told() -> bool:
            return bool(logs.lines("flags_not_followed"))

        await until(told)
    assert live.for_tenant(clinic.tenant_id)[CHAT]
    await owner.execute("UPDATE flag_overrides SET target = '{\"default\": false}' WHERE flag = $1", CHAT)
    await becomes(live, clinic.tenant_id, False)


async def test_the_gauge_shows_the_value_of_a_tenant_without_an_override(clinic: Clinic) -> None:
    flags = live_flags(clinic.database, enforce_session_gated_billing=True)

    def shown() -> set[Flag]:
        return {flag for flag in Flag if flags._metrics.sample("feature_flag_enabled", flag=flag.value)}

    assert shown() == {BILLING}
    async with flags.following():
        await put(clinic, Override(BILLING, clinic.tenant_id, Target(False)))
        await put(clinic, Override(CHAT, None, Target(None, 1.0)))
        await becomes(flags, clinic.tenant_id, True)
        assert shown() == {BILLING}
        await put(clinic, Override(CHAT, None, Target(True)))
        await put(clinic, Override(BILLING, None, Target(False)))
        await flags.reload()
        assert shown() == {CHAT}


async def test_overrides_that_shadow_the_environment_are_said_at_the_start(clinic: Clinic) -> None:
    await put(clinic, Override(CHAT, None, Target(False)))
    await put(clinic, Override(BILLING, clinic.tenant_id, Target(False)))
    flags = live_flags(clinic.database, enforce_session_gated_chat=True)
    with capture_logs() as logs:
        async with flags.following():
            said = [
                (line["flag"], line.get("tenant_id"), line["target"], line["environment"])
                for line in logs.lines("flag_environment_shadowed")
            ]
    assert said == [(CHAT, None, {"default": False, "share": None, "allow": {}}, True)]
