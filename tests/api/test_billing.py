"""What sessions cost, over HTTP, with the clock of the database moved."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final, TypeAlias

import asyncpg
import pytest

from libs.guardrails import Principal
from tests.api.expect import found, problem
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.clock import Clock
from tests.running import Api

RATES: Final = {"MW": (350_000, "MWK"), "KE": (300, "USD")}
UNITS: Final = {"text": "text", "voice": "voice", "video": "video"}


async def begin(api: Api, live: LiveSession, modality: str) -> None:
    """Lets the units run, as the parties do: the doctor answers in a text session, a call is taken and connects."""
    if modality == "text":
        message = {"client_message_id": "begins", "body": "Good morning"}
        found(await api.as_(live.doctor).post(f"/chat/{live.context}/messages", json=message), 201)
        return
    found(await api.as_(live.patient).post(f"/sessions/{live.context}/ring"))
    found(await api.as_(live.doctor).post(f"/sessions/{live.context}/answer"))
    found(await api.as_(live.patient).post(f"/sessions/{live.context}/connected"))


async def stay(api: Api, live: LiveSession, modality: str = "text") -> None:
    """Somebody is still there: a session that is forgotten ends by itself."""
    if modality == "text":
        found(await api.as_(live.patient).get(f"/sessions/{live.context}"))
        await api.runtime.activity.flush()
    else:
        found(await api.as_(live.patient).post(f"/sessions/{live.context}/connected"))


async def talk(api: Api, clock: Clock, live: LiveSession, *, minutes: int) -> None:
    """So much time passes in a text session, with something to say now and then."""
    for passed in range(0, minutes, 10):
        await clock.advance(min(10, minutes - passed) * MINUTE)
        await stay(api, live)


async def end(api: Api, live: LiveSession, by: Principal | None = None) -> dict[str, Any]:
    ended: dict[str, Any] = found(await api.as_(by or live.patient).post(f"/sessions/{live.context}/end"))
    return ended


async def units_of(api: Api, patient: Principal) -> dict[str, int]:
    units: dict[str, int] = found(await api.as_(patient).get("/billing/balance"))["units"]
    return units


async def wallets_of(api: Api, doctor: Principal) -> list[tuple[str, int]]:
    wallets = found(await api.as_(doctor).get("/billing/balance"))["wallets"]
    return [(wallet["currency"], wallet["balance_minor"]) for wallet in wallets]


async def lines_of(api: Api, live: LiveSession) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = found(await api.as_(live.patient).get(f"/sessions/{live.context}/billing"))["items"]
    return lines


Meanwhile: TypeAlias = Callable[[Api, Clinic, LiveSession], Awaitable[object]]


async def nobody_looks(api: Api, clinic: Clinic, live: LiveSession) -> None: ...


async def the_worker_ticks(api: Api, clinic: Clinic, live: LiveSession) -> None:
    await clinic.settle()


async def a_client_deducts(api: Api, clinic: Clinic, live: LiveSession) -> None:
    found(await api.as_(live.doctor).post(f"/sessions/{live.context}/deductions"))


async def everybody_at_once(api: Api, clinic: Clinic, live: LiveSession) -> None:
    await asyncio.gather(
        *(clinic.settle() for _ in range(3)),
        *(a_client_deducts(api, clinic, live) for _ in range(3)),
    )


MEANWHILE: Final[dict[str, Meanwhile]] = {
    "nobody looks": nobody_looks,
    "the worker ticks": the_worker_ticks,
    "a client deducts": a_client_deducts,
    "all at once": everybody_at_once,
}
# Whole units, and one more for whoever ends it; never more than the patient had.
CHARGED: Final = {8: 1, 10: 2, 12: 2, 25: 3, 29: 3}


@pytest.mark.parametrize("modality", UNITS)
@pytest.mark.parametrize("minutes", CHARGED)
async def test_a_session_costs_its_whole_units_and_one_for_its_end_whoever_ends_it(
    api: Api, clinic: Clinic, clock: Clock, modality: str, minutes: int
) -> None:
    for (country, rate), who, meanwhile in zip(
        list(RATES.items()) * 6, ["patient", "doctor", "operator"] * 4, list(MEANWHILE.values()) * 3, strict=True
    ):
        patient, doctor = await clinic.patient(units=3), await clinic.doctor(country=country)
        live = await clinic.session(modality, patient=patient, doctor=doctor, lasts=2 * MINUTE)
        await begin(api, live, modality)
        for _ in range(minutes):
            await clock.advance(MINUTE)
            await stay(api, live, modality)
            await meanwhile(api, clinic, live)

        ended = await end(api, live, {"patient": patient, "doctor": doctor, "operator": clinic.operator}[who])

        units = CHARGED[minutes]
        assert ended["session"]["units_charged"] == ended["billing"]["units_charged"] == units
        assert ended["session"]["end_reason"] == f"ended_by_{who}"
        assert (await units_of(api, patient))[modality] == 3 - units
        assert await wallets_of(api, doctor) == [(rate[1], units * rate[0])]
        lines = await lines_of(api, live)
        assert [line["unit"] for line in lines] == list(range(1, units + 1))
        for line in lines:
            sums: Counter[str] = Counter()
            for entry in line["entries"]:
                sums[entry["commodity"]] += entry["amount"]
            assert dict(sums) == {modality: 0, rate[1]: 0}


@pytest.mark.parametrize("modality", UNITS)
async def test_a_session_that_never_began_costs_nothing(api: Api, clinic: Clinic, clock: Clock, modality: str) -> None:
    live = await clinic.session(modality)
    await clock.advance(12 * MINUTE)
    problem(await api.as_(live.patient).post(f"/sessions/{live.context}/deductions"), 409, "SESSION_NOT_CONNECTED")
    ended = await end(api, live, live.doctor)
    assert ended["billing"] == {"units_charged": 0, "units_added": 0, "payouts": []}
    assert await lines_of(api, live) == []
    assert await wallets_of(api, live.doctor) == []


@pytest.mark.parametrize("modality", UNITS)
@pytest.mark.parametrize("meanwhile", ["nobody looks", "the worker ticks"])
async def test_a_spent_allowance_ends_the_session_without_a_unit_more(
    api: Api, clinic: Clinic, clock: Clock, modality: str, meanwhile: str
) -> None:
    patient, _ = await clinic.patient(units=2), await clinic.patient()
    live = await clinic.session(modality, patient=patient, lasts=2 * MINUTE)
    await begin(api, live, modality)
    for _ in range(20):
        shown = found(await api.as_(patient).get(f"/sessions/{live.context}"))
        assert shown["status"] == "active"
        await stay(api, live, modality)
        await clock.advance(MINUTE)
        await MEANWHILE[meanwhile](api, clinic, live)
    assert 0 < shown["remaining_seconds"] <= 60

    # Whoever comes to end it finds it over.
    ended = await end(api, live)
    assert ended["already_ended"] is True
    assert (ended["session"]["end_reason"], ended["billing"]["units_charged"]) == ("allowance_spent", 2)
    assert (await units_of(api, patient))[modality] == 0
    message = {"client_message_id": "late", "body": "One more thing"}
    problem(await api.as_(patient).post(f"/chat/{live.context}/messages", json=message), 409, "SESSION_NOT_ACTIVE")
    appointment = found(await api.as_(patient).get(f"/appointments/{live.appointment_id}"))
    assert appointment["status"] == "COMPLETED"


async def test_a_message_that_finds_the_allowance_spent_is_refused_and_the_end_is_stored(
    api: Api, clinic: Clinic, clock: Clock
) -> None:
    live = await clinic.session(patient=await clinic.patient(units=1))
    await begin(api, live, "text")
    await clock.advance(10 * MINUTE)
    message = {"client_message_id": "late", "body": "One more thing"}
    problem(await api.as_(live.doctor).post(f"/chat/{live.context}/messages", json=message), 409, "SESSION_NOT_ACTIVE")
    shown = found(await api.as_(live.doctor).get(f"/sessions/{live.context}"))
    assert (shown["status"], shown["end_reason"], shown["units_charged"]) == ("ended", "allowance_spent", 1)


async def test_a_worker_that_was_away_charges_nothing_for_its_absence(api: Api, clinic: Clinic, clock: Clock) -> None:
    live = await clinic.session(patient=await clinic.patient(units=1))
    await begin(api, live, "text")
    await clock.advance(timedelta(hours=5))
    [settled] = await clinic.settle()
    assert (settled.units_charged, settled.end_reason) == (1, "allowance_spent")


async def test_ending_again_changes_nothing_and_says_so(api: Api, clinic: Clinic, clock: Clock) -> None:
    live = await clinic.session()
    await begin(api, live, "text")
    await clock.advance(12 * MINUTE)
    first = await end(api, live)
    assert first["billing"] == {
        "units_charged": 2,
        "units_added": 2,
        "payouts": [{"amount_minor": 350_000, "currency": "MWK"}] * 2,
    }
    await clock.advance(12 * MINUTE)
    for again in [await end(api, live, live.doctor), await end(api, live, clinic.operator)]:
        assert again["already_ended"] is True
        assert again["session"] == first["session"]
        assert again["billing"] == {"units_charged": 2, "units_added": 0, "payouts": []}
    problem(await api.as_(live.patient).post(f"/sessions/{live.context}/deductions"), 409, "SESSION_NOT_ACTIVE")


async def test_fifty_who_end_at_once_end_it_once(api: Api, clinic: Clinic, clock: Clock) -> None:
    live = await clinic.session()
    await begin(api, live, "text")
    await clock.advance(12 * MINUTE)
    answers = await asyncio.gather(*(end(api, live, by) for by in [live.patient, live.doctor] * 25))
    assert Counter(answer["already_ended"] for answer in answers) == {False: 1, True: 49}
    assert sum(answer["billing"]["units_added"] for answer in answers) == 2
    assert len(await lines_of(api, live)) == 2


async def test_subscriptions_are_used_up_first_in_first_out(
    api: Api, clinic: Clinic, clock: Clock, owner: "asyncpg.Connection[Any]"
) -> None:
    patient = await clinic.patient(units=None)
    for units in (1, 2, 5):
        await clinic.subscribe(patient, units)
    # One that is over, and one that has not begun, do not count.
    await clinic.subscribe(patient, 50)
    await clinic.subscribe(patient, 60)
    await owner.execute(
        "UPDATE subscriptions SET starts_at = starts_at - interval '9 days', ends_at = clock() - interval '1 hour'"
        " WHERE text_sessions_granted = 50"
    )
    await owner.execute(
        "UPDATE subscriptions SET starts_at = clock() + interval '1 hour' WHERE text_sessions_granted = 60"
    )
    # The second one bought began first.
    await owner.execute(
        "UPDATE subscriptions SET starts_at = starts_at - interval '1 day' WHERE text_sessions_granted = 2"
    )
    live = await clinic.session(patient=patient)
    await begin(api, live, "text")
    await talk(api, clock, live, minutes=38)
    assert (await end(api, live))["billing"]["units_charged"] == 4
    left = await clinic.fetch(
        "SELECT text_sessions_granted, text_sessions_remaining FROM subscriptions ORDER BY text_sessions_granted"
    )
    assert [tuple(row) for row in left] == [(1, 0), (2, 0), (5, 4), (50, 50), (60, 60)]
    used = [line["entries"][0]["subscription_id"] for line in await lines_of(api, live)]
    assert used == [used[0], used[0], used[2], used[3]]
    assert len(set(used)) == 3


async def test_what_a_doctor_earns_in_two_currencies_is_never_added_up(
    api: Api, clinic: Clinic, clock: Clock, owner: "asyncpg.Connection[Any]"
) -> None:
    doctor = await clinic.doctor(country="MW")
    for country in ("MW", "KE"):
        await owner.execute("UPDATE users SET country = $1 WHERE id = $2", country, doctor.user_id)
        live = await clinic.session(doctor=doctor)
        await begin(api, live, "text")
        await clock.advance(MINUTE)
        await end(api, live)
    assert await wallets_of(api, doctor) == [("MWK", 350_000), ("USD", 300)]


async def test_the_rates_are_the_clinics_to_set(
    api: Api, clinic: Clinic, clock: Clock, owner: "asyncpg.Connection[Any]"
) -> None:
    await owner.execute("INSERT INTO payout_rates VALUES ('TZ', 'TZS', 750000)")
    doctor = await clinic.doctor(country="TZ")
    live = await clinic.session(doctor=doctor)
    await begin(api, live, "text")
    await end(api, live)
    assert await wallets_of(api, doctor) == [("TZS", 750_000)]
