"""What sessions cost, over HTTP, with the clock of the database moved."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from itertools import product
from typing import Any, Final, TypeAlias

import asyncpg
import pytest

from libs.guardrails import Principal
from libs.observability.testing import capture_logs
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


async def test_a_refund_is_a_transaction_of_its_own(api: Api, clinic: Clinic, clock: Clock) -> None:
    patient = await clinic.patient(units=5)
    live = await clinic.session(patient=patient)
    await begin(api, live, "text")
    await talk(api, clock, live, minutes=25)
    await end(api, live)
    operator = api.as_(clinic.operator)
    wanted = {"context": live.context, "unit": 2, "reason": "the line was bad"}

    refunded = found(await operator.post("/admin/refunds", json=wanted), 201)

    assert refunded["units_refunded"] == 1
    assert (await units_of(api, patient))["text"] == 3
    assert await wallets_of(api, live.doctor) == [("MWK", 2 * 350_000)]
    charged = {line["id"]: line for line in await lines_of(api, live)}
    [line] = refunded["items"]
    amounts = [(entry["account"], entry["amount"]) for entry in charged[line["reverses"]]["entries"]]
    assert [(entry["account"], -entry["amount"]) for entry in line["entries"]] == amounts
    problem(await operator.post("/admin/refunds", json=wanted), 409, "NOTHING_TO_REFUND")
    # The rest, all at once and by several: each unit is taken back once.
    rest = {"context": live.context}
    answers = await asyncio.gather(*(operator.post("/admin/refunds", json=rest) for _ in range(10)))
    assert Counter(answer.status_code for answer in answers) == {201: 1, 409: 9}
    assert (await units_of(api, patient))["text"] == 5
    assert await wallets_of(api, live.doctor) == [("MWK", 0)]
    shown = found(await api.as_(patient).get(f"/sessions/{live.context}/billing"))
    assert (shown["units_charged"], shown["units_refunded"], len(shown["items"])) == (3, 3, 6)
    done = found(await operator.get("/admin/audit-log"))["items"]
    assert [entry["action"] for entry in done] == ["charges_refunded"] * 2
    assert done[1]["details"]["reason"] == "the line was bad"


async def test_units_that_come_back_let_a_waiting_appointment_try_again(api: Api, clinic: Clinic, clock: Clock) -> None:
    patient = await clinic.patient(units=1)
    live = await clinic.session(patient=patient)
    await begin(api, live, "text")
    await clock.advance(MINUTE)
    await end(api, live)
    waiting = await clinic.appointment(patient=patient)
    assert (await clinic.convert())[waiting].result == "failed"
    refund = {"context": live.context}
    found(await api.as_(clinic.operator).post("/admin/refunds", json=refund), 201)
    assert (await clinic.convert())[waiting].result == "created"


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("UPDATE ledger_entries SET amount = 2 * amount", "ledger_entries_only_added_to"),
        ("DELETE FROM ledger_entries", "ledger_entries_only_added_to"),
        ("TRUNCATE ledger_entries", "ledger_entries_only_added_to"),
        ("UPDATE ledger_transactions SET unit = 9", "ledger_transactions_only_added_to"),
        ("DELETE FROM ledger_transactions", "ledger_transactions_only_added_to"),
        ("TRUNCATE ledger_transactions CASCADE", "ledger_transactions_only_added_to"),
        (
            "INSERT INTO ledger_entries (tenant_id, transaction_id, account, commodity, amount)"
            " SELECT tenant_id, id, 'payable', 'MWK', 1 FROM ledger_transactions LIMIT 1",
            "ledger_entries_closed",
        ),
        (
            "INSERT INTO ledger_transactions (tenant_id, idempotency_key, kind, session_id, unit)"
            " SELECT tenant_id, 'a second time', 'charge', session_id, 2 FROM ledger_transactions LIMIT 1",
            "ledger_transactions_balance",
        ),
        (
            "WITH t AS (INSERT INTO ledger_transactions (tenant_id, idempotency_key, kind, session_id, unit)"
            " SELECT tenant_id, 'a second time', 'charge', session_id, 2 FROM ledger_transactions LIMIT 1"
            " RETURNING tenant_id, id) INSERT INTO ledger_entries (tenant_id, transaction_id, account, commodity,"
            " amount) SELECT tenant_id, id, 'payable', commodity, amount FROM t,"
            " (VALUES ('MWK', 1), ('USD', -1)) AS v (commodity, amount)",
            "ledger_transactions_balance",
        ),
        (
            "INSERT INTO ledger_transactions (tenant_id, idempotency_key, kind, session_id, unit)"
            " SELECT tenant_id, idempotency_key, kind, session_id, unit FROM ledger_transactions LIMIT 1",
            "ledger_transactions_idempotency_key_key",
        ),
        (
            "INSERT INTO ledger_transactions (tenant_id, idempotency_key, kind, session_id, unit)"
            " SELECT tenant_id, 'never began', 'charge', id, 1 FROM sessions WHERE status = 'waiting'",
            "ledger_transactions_begun",
        ),
    ],
)
async def test_not_even_the_owner_of_the_tables_rewrites_the_ledger(
    api: Api, clinic: Clinic, owner: "asyncpg.Connection[Any]", statement: str, constraint: str
) -> None:
    live = await clinic.session()
    await clinic.session()
    await begin(api, live, "text")
    await end(api, live)
    with pytest.raises(asyncpg.PostgresError) as refused:
        await owner.execute(statement)
    assert refused.value.constraint_name == constraint


@pytest.mark.parametrize(
    "statement",
    [
        *(
            f"{verb} {table}{rest}"
            for (verb, rest), table in product(
                [("UPDATE", " SET tenant_id = tenant_id"), ("DELETE FROM", ""), ("TRUNCATE", "")],
                ["ledger_transactions", "ledger_entries", "wallets", "payout_rates"],
            )
            if not (table == "payout_rates" and verb == "UPDATE")
        ),
        "UPDATE payout_rates SET amount_minor = 1",
        "UPDATE subscriptions SET text_sessions_remaining = 100",
        "UPDATE subscriptions SET text_sessions_granted = 100",
        "INSERT INTO wallets (doctor_id, currency, tenant_id, balance) VALUES (1, 'MWK', 1, 1)",
    ],
)
async def test_the_services_cannot_touch_money_but_by_new_entries(clinic: Clinic, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await clinic.fetch(statement)


async def test_a_charge_that_fails_leaves_session_balance_and_wallet_as_they_were(
    api: Api, clinic: Clinic, clock: Clock, owner: "asyncpg.Connection[Any]"
) -> None:
    live = await clinic.session()
    await begin(api, live, "text")
    await clock.advance(12 * MINUTE)
    # The last row that an end writes cannot be written.
    await owner.execute("ALTER TABLE outbox_deliveries ADD CONSTRAINT broken CHECK (consumer = '') NOT VALID")
    refused = await api.as_(live.patient).post(f"/sessions/{live.context}/end")
    assert refused.status_code == 500
    await owner.execute("ALTER TABLE outbox_deliveries DROP CONSTRAINT broken")
    shown = found(await api.as_(live.patient).get(f"/sessions/{live.context}"))
    assert (shown["status"], shown["units_charged"]) == ("active", 0)
    assert (await units_of(api, live.patient))["text"] == 10
    assert await wallets_of(api, live.doctor) == []
    assert (await end(api, live))["billing"]["units_added"] == 2


async def test_one_idempotency_key_refunds_once(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    await begin(api, live, "text")
    await end(api, live)
    wanted = {"context": live.context}
    first, again = [
        await api.as_(clinic.operator).post("/admin/refunds", json=wanted, headers={"Idempotency-Key": "r-1"})
        for _ in range(2)
    ]
    assert found(first, 201) == found(again, 201)
    assert again.headers["idempotent-replayed"] == "true"


_POST: Final = """
    WITH t AS (
        INSERT INTO public.ledger_transactions (tenant_id, idempotency_key, kind, session_id, unit)
        SELECT tenant_id, 'forged', 'charge', id, 9 FROM public.sessions WHERE status = $1 RETURNING tenant_id, id
    )
    INSERT INTO public.ledger_entries (tenant_id, transaction_id, account, doctor_id, commodity, amount)
    SELECT t.tenant_id, t.id, 'wallet', (SELECT min(id) FROM users WHERE role = 'doctor'), 'MWK', 777 FROM t
"""


@pytest.mark.parametrize(
    ("prepare", "status"),
    [
        # The checks look at the tables, whatever a connection calls by their names.
        (
            "CREATE TEMP TABLE sessions (id bigint, tenant_id bigint, kind text, status text, activated_at timestamptz,"
            " connected_at timestamptz); CREATE TEMP TABLE ledger_entries (LIKE public.ledger_entries)",
            "waiting",
        ),
        # A check that waits for the end of the transaction cannot be had while all is still well.
        ("SET CONSTRAINTS ALL IMMEDIATE", "ended"),
    ],
)
async def test_no_trick_of_a_connection_makes_money(api: Api, clinic: Clinic, prepare: str, status: str) -> None:
    live = await clinic.session()
    await clinic.session()
    await begin(api, live, "text")
    await end(api, live)
    before = await clinic.fetchval("SELECT sum(balance) FROM wallets")
    async with clinic.database.alone("forger") as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(prepare)

        async def forge() -> None:
            await connection.execute(_POST, status)
            await transaction.commit()

        with pytest.raises(asyncpg.PostgresError):
            await forge()
    assert await clinic.fetchval("SELECT sum(balance) FROM wallets") == before


async def test_nobody_works_for_nothing_because_a_rate_is_missing(
    api: Api, clinic: Clinic, clock: Clock, owner: "asyncpg.Connection[Any]"
) -> None:
    live = await clinic.session(doctor=await clinic.doctor(country="KE"))
    await begin(api, live, "text")
    await owner.execute("DELETE FROM payout_rates WHERE country = '*'")
    assert (await api.as_(live.patient).post(f"/sessions/{live.context}/end")).status_code == 500
    await owner.execute("INSERT INTO payout_rates VALUES ('*', 'USD', 300)")
    assert (await end(api, live))["billing"]["payouts"] == [{"amount_minor": 300, "currency": "USD"}]


async def test_why_somebody_ended_it_stays_between_the_parties(api: Api, clinic: Clinic) -> None:
    live = await clinic.session()
    with capture_logs() as logs:
        ended = found(await api.as_(live.patient).post(f"/sessions/{live.context}/end", json={"reason": "I am ill"}))
        assert "I am ill" not in str(logs.lines())
    assert ended["session"]["end_reason"] == "I am ill"
    told = await clinic.fetchval("SELECT payload ->> 'end_reason' FROM outbox_events WHERE name = 'session_ended'")
    assert told == "ended_by_patient"
