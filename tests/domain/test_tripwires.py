"""A flag that refuses too much goes back to off by itself: once, audited, and for the right reasons only."""

import asyncio
from typing import Any

import pytest

from libs.domain.flags import overrides, tripwires
from libs.domain.flags.tripwires import Trip
from libs.domain.transaction import transaction
from libs.guardrails import Flag, Override, Target, Tripwire
from libs.guardrails.flags import position
from libs.observability.testing import capture_logs
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock

CHAT = Flag.ENFORCE_SESSION_GATED_CHAT
BILLING = Flag.ENFORCE_SESSION_GATED_BILLING
LENIENT = Flag.ALLOW_LEGACY_APPOINTMENT_CHAT


async def put(clinic: Clinic, override: Override) -> None:
    async with transaction(clinic.database, clinic.bell) as tx:
        await overrides.put(tx, override, None)


async def trip(clinic: Clinic) -> list[Trip]:
    async with transaction(clinic.database, clinic.bell) as tx:
        return await tripwires.trip(tx)


async def decided(
    clinic: Clinic, requests: int, verdict: str, flag: str = "", operation: str = "send_message", ago: int = 0
) -> None:
    """So many decisions, some minutes ago, as the processes count them."""
    await clinic.fetch(
        """
        INSERT INTO decision_totals (minute, tenant_id, operation, verdict, flag, requests)
        VALUES (date_trunc('minute', clock()) - $1 * interval '1 minute', $2, $3, $4, $5, $6)
        ON CONFLICT (minute, tenant_id, operation, verdict, flag)
        DO UPDATE SET requests = decision_totals.requests + excluded.requests
        """,
        ago,
        clinic.tenant_id,
        operation,
        verdict,
        flag,
        requests,
    )


async def refused(clinic: Clinic, requests: int, **options: Any) -> None:
    await decided(clinic, requests, "refused", CHAT.value, **options)


@pytest.mark.parametrize("tenant", [True, False])
async def test_more_than_a_tenth_refused_turns_the_flag_off(clinic: Clinic, tenant: bool) -> None:
    tenant_id = clinic.tenant_id if tenant else None
    armed = Override(CHAT, tenant_id, Target(True), Tripwire())
    await put(clinic, armed)
    await decided(clinic, 45, "allowed")
    await refused(clinic, 5)
    assert await trip(clinic) == []

    await refused(clinic, 1, operation="get_messages")
    assert await trip(clinic) == [Trip(armed, 51, 6)]

    async with transaction(clinic.database, clinic.bell) as tx:
        assert await overrides.all_of(tx) == [Override(CHAT, tenant_id, Target(False))]
    told = await clinic.fetchrow("SELECT * FROM audit_log ORDER BY id DESC LIMIT 1")
    assert (told["tenant_id"], told["actor_id"], told["action"]) == (tenant_id, None, "flag_tripped")
    assert told["subject"] == f"flag:{CHAT}"
    assert told["details"] == {
        "before": overrides.as_json(armed),
        "after": {"target": {"default": False, "share": None, "allow": {}}, "tripwire": None},
        "requests": 51,
        "refused": 6,
    }
    assert await trip(clinic) == []


async def test_what_is_tripped_is_counted_and_logged(clinic: Clinic) -> None:
    with capture_logs() as logs:
        Trip(Override(CHAT, clinic.tenant_id, Target(True), Tripwire()), 51, 6).tell(clinic.metrics)
        [line] = logs.lines("flag_tripped")
    assert clinic.metrics.sample("flag_tripwire_total", flag=CHAT.value) == 1
    assert (line["level"], line["flag"], line["tenant_id"]) == ("error", CHAT, clinic.tenant_id)
    assert (line["requests"], line["refused"]) == (51, 6)


async def test_few_requests_prove_nothing(clinic: Clinic) -> None:
    await put(clinic, Override(CHAT, None, Target(True), Tripwire()))
    await refused(clinic, 49)
    assert await trip(clinic) == []
    await decided(clinic, 1, "allowed")
    assert len(await trip(clinic)) == 1


async def test_only_the_window_counts_and_only_since_the_override_was_changed(clinic: Clinic, clock: Clock) -> None:
    await refused(clinic, 1000, ago=1)
    await put(clinic, Override(CHAT, None, Target(True), Tripwire(minutes=3)))
    assert await trip(clinic) == []

    await clock.advance(10 * MINUTE)
    await refused(clinic, 1000, ago=3)
    assert await trip(clinic) == []
    await refused(clinic, 1000, ago=2)
    assert len(await trip(clinic)) == 1


async def test_only_refusals_by_that_flag_and_requests_of_its_family_count(clinic: Clinic) -> None:
    await put(clinic, Override(CHAT, None, Target(True), Tripwire()))
    await decided(clinic, 100, "refused", LENIENT.value)
    await decided(clinic, 100, "warned", CHAT.value)
    await decided(clinic, 100, "refused")
    await refused(clinic, 33)
    await decided(clinic, 100_000, "allowed", operation="complete_session")
    assert await trip(clinic) == []
    await refused(clinic, 1)
    assert [(each.requests, each.refused) for each in await trip(clinic)] == [(334, 34)]


async def test_billing_is_judged_by_billing(clinic: Clinic) -> None:
    armed = Override(BILLING, None, Target(True), Tripwire())
    await put(clinic, armed)
    await decided(clinic, 100_000, "allowed")
    await decided(clinic, 60, "refused", BILLING.value, operation="complete_session")
    assert await trip(clinic) == [Trip(armed, 60, 60)]


async def test_tenants_whom_the_override_does_not_concern_do_not_count(clinic: Clinic) -> None:
    theirs = [await Clinic.open(clinic.database, f"Clinic {number}") for number in range(6)]
    everyone = [clinic, *theirs]
    first = min(everyone, key=lambda each: position(CHAT, each.tenant_id))
    listed, own = [each for each in everyone if each is not first][:2]
    share = position(CHAT, first.tenant_id) + 1e-9
    armed = Override(CHAT, None, Target(None, share, {"tenant": frozenset({listed.tenant_id})}), Tripwire())
    await put(clinic, armed)
    await put(clinic, Override(CHAT, own.tenant_id, Target(True)))
    for each in everyone:
        # By the thousand where the flag is off, or on for another reason.
        await decided(each, 40 if each in (first, listed) else 1000, "allowed")
    await refused(own, 1000)
    assert await trip(clinic) == []

    await refused(first, 5)
    await refused(listed, 5)
    assert await trip(clinic) == [Trip(armed, 90, 10)]


async def test_of_many_workers_one_trips(clinic: Clinic) -> None:
    await put(clinic, Override(CHAT, None, Target(True), Tripwire()))
    await refused(clinic, 60)
    tripped = await asyncio.gather(*(trip(clinic) for _ in range(8)))
    assert sum(map(len, tripped)) == 1
    assert await clinic.fetchval("SELECT count(*) FROM audit_log WHERE action = 'flag_tripped'") == 1


async def test_a_flag_being_changed_at_this_moment_is_left_alone(clinic: Clinic) -> None:
    await put(clinic, Override(CHAT, None, Target(True), Tripwire()))
    await refused(clinic, 60)
    async with transaction(clinic.database, clinic.bell) as tx:
        await overrides.put(tx, Override(CHAT, None, Target(None, 0.5)), None)
        assert await trip(clinic) == []
    assert await trip(clinic) == []
    async with transaction(clinic.database, clinic.bell) as tx:
        assert await overrides.all_of(tx) == [Override(CHAT, None, Target(None, 0.5))]
