"""The ledger: what is taken back, and what nobody can do to it."""

import asyncio
from collections import Counter
from itertools import product
from typing import Any, Final

import asyncpg
import pytest

from libs.observability.testing import capture_logs
from tests.api.expect import found, problem
from tests.api.test_billing import begin, end, lines_of, talk, units_of, wallets_of
from tests.clinic import MINUTE, Clinic
from tests.clock import Clock
from tests.running import Api


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
