"""Each invariant notices when it is broken, whatever keeps that from happening, and nothing else."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, Final

import asyncpg
import pytest

from libs.domain.billing import ledger
from libs.domain.billing.posting import CHARGE_APPOINTMENTS
from libs.domain.db import Database
from libs.domain.invariants import EXAMPLES, INVARIANTS, audit, snapshot, violations
from libs.domain.sessions.settlement import Ending, Settlement
from libs.domain.transaction import transaction
from services.cli.embedded import LOGIN, Servers
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.conftest import Urls
from tests.servers import copy_of, url_of

# What the legacy paths do: $1 the appointment, $2 what becomes of it.
BILL: Final = f"""
    WITH over AS (UPDATE appointments SET status = $2 WHERE id = $1 RETURNING *),
    billed AS (
        SELECT id, tenant_id, patient_id, doctor_id, modality, starts_at AS begun_at, 0 AS charged, 1 AS wanted,
            status <> 'NO_SHOW' AS pays
        FROM over
    ),
    {CHARGE_APPOINTMENTS}
    SELECT added FROM charged
"""


async def end(clinic: Clinic, session: LiveSession) -> None:
    async with transaction(clinic.database, clinic.bell) as tx:
        ending = Ending("end", session.doctor.user_id, "ended_by_doctor")
        assert await Settlement(clinic.metrics).one(tx, session.ref.id, ending)


@pytest.fixture(scope="module")
async def busy(servers: Servers, migrated: str) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """The owner's connection to a database with a busy clinic, which whoever changes something takes back."""
    async with copy_of(servers, migrated, "busy_clinic") as name:
        database = Database(url_of(servers, name, LOGIN), application="tests")
        owner = await asyncpg.connect(url_of(servers, name))
        await live(await Clinic.open(database), owner)
        await database.close()
        yield owner
        await owner.close()


async def live(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    """Sessions of every modality are charged and end, one of them is refunded, two go on, appointments are billed
    without a session, and another clinic opens next door."""
    held = []
    for modality in ("text", "voice", "video"):
        session = await clinic.session(modality)
        for sender in (session.patient, session.doctor):
            await clinic.message(session, sender=sender)
        await clinic.begin(session, ago=12 * MINUTE)
        await clinic.settle()
        await end(clinic, session)
        held.append(session)
    async with transaction(clinic.database, clinic.bell) as tx:
        assert len(await ledger.refund(tx, clinic.tenant_id, clinic.operator, held[0].ref)) == 2
    for session in (await clinic.session(), await clinic.session("video")):
        for _ in range(3):
            await clinic.message(session)
    await clinic.appointment(status="PENDING", starts_in=timedelta(days=1))
    for status in ("COMPLETED", "NO_SHOW"):
        assert await owner.fetchval(BILL, await clinic.appointment(), status) == 1
    await clinic.dispatch()
    await Clinic.open(clinic.database, "Next door")


async def test_a_clinic_after_a_busy_life_keeps_them_all(busy: "asyncpg.Connection[Any]") -> None:
    assert await violations(busy) == {}
    assert [finding.invariant for finding in (await audit(busy)).findings] == list(INVARIANTS)
    kinds = await busy.fetch("SELECT kind, count(*)::int FROM ledger_transactions GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in kinds] == [("charge", 6), ("legacy", 2), ("refund", 2)]


# No trigger fires and no foreign key is checked any more.
BY_HAND: Final = "SET LOCAL session_replication_role = replica;"

ENDED: Final = "(SELECT min(id) FROM sessions WHERE status = 'ended')"
LIVE: Final = "(SELECT min(id) FROM sessions WHERE ended_at IS NULL)"
CHARGED: Final = "(SELECT max(id) FROM ledger_transactions WHERE kind = 'charge')"
REFUND: Final = "(SELECT min(id) FROM ledger_transactions WHERE kind = 'refund')"
BILLED: Final = "(SELECT min(appointment_id) FROM ledger_transactions WHERE kind = 'legacy')"
ENDED_AGAIN: Final = """
    INSERT INTO sessions (tenant_id, kind, modality, source, appointment_id, patient_id, doctor_id, status, expires_at,
                          ended_at, ended_seq)
    SELECT tenant_id, 'text', 'text', 'APPOINTMENT', id, patient_id, doctor_id, 'ended', ends_at, ends_at, 0
    FROM appointments"""

BREAKS: Final = [
    (
        "one_session_per_appointment",
        f"""
        ALTER TABLE appointments DROP CONSTRAINT appointments_session_id_id_fkey;
        ALTER TABLE sessions DROP CONSTRAINT sessions_appointment_id_key;
        {ENDED_AGAIN} WHERE status = 'COMPLETED' AND session_id IS NOT NULL LIMIT 1
        """,
    ),
    (
        "appointment_in_progress_has_session",
        """
        UPDATE appointments SET status = 'IN_PROGRESS' WHERE status = 'COMPLETED' AND session_id IS NOT NULL;
        UPDATE busy_intervals SET active = true WHERE appointment_id IN (
            SELECT id FROM appointments WHERE status = 'IN_PROGRESS')
        """,
    ),
    (
        "appointment_in_progress_has_session",
        """
        ALTER TABLE appointments DROP CONSTRAINT appointments_in_progress_has_session_check;
        UPDATE appointments SET status = 'IN_PROGRESS' WHERE status = 'PENDING'
        """,
    ),
    (
        "live_session_has_appointment_in_progress",
        "UPDATE appointments SET status = 'COMPLETED' WHERE status = 'IN_PROGRESS'",
    ),
    (
        "patient_in_one_live_session",
        f"""
        DROP INDEX sessions_live_patient_key;
        UPDATE sessions SET patient_id = (SELECT patient_id FROM sessions WHERE id = {LIVE}) WHERE ended_at IS NULL
        """,
    ),
    (
        "doctor_in_one_live_session",
        f"""
        DROP INDEX sessions_live_doctor_key;
        UPDATE sessions SET doctor_id = (SELECT doctor_id FROM sessions WHERE id = {LIVE}) WHERE ended_at IS NULL
        """,
    ),
    (
        "doctor_not_double_booked",
        """
        ALTER TABLE busy_intervals DROP CONSTRAINT busy_intervals_no_overlap;
        INSERT INTO busy_intervals (tenant_id, doctor_id, appointment_id, during)
        SELECT tenant_id, doctor_id, (SELECT max(id) FROM appointments), during FROM busy_intervals WHERE active LIMIT 1
        """,
    ),
    (
        "appointment_holds_its_slot",
        "UPDATE busy_intervals SET active = false WHERE appointment_id = (SELECT max(id) FROM appointments"
        " WHERE status IN ('PENDING', 'CONFIRMED', 'IN_PROGRESS'))",
    ),
    ("messages_numbered", f"UPDATE conversations SET last_seq = last_seq + 1 WHERE session_id = {LIVE}"),
    (
        "messages_numbered",
        f"DELETE FROM messages m USING conversations c WHERE c.id = m.conversation_id AND c.session_id = {LIVE}",
    ),
    (
        "messages_numbered",
        f"""
        DELETE FROM messages m USING conversations c
        WHERE c.id = m.conversation_id AND c.session_id = {LIVE} AND m.seq = 2
        """,
    ),
    (
        "messages_numbered",
        f"""
        ALTER TABLE messages DROP CONSTRAINT messages_conversation_id_seq_key CASCADE;
        UPDATE messages m SET seq = 3 FROM conversations c
        WHERE c.id = m.conversation_id AND c.session_id = {LIVE} AND m.seq = 2
        """,
    ),
    ("ended_session_has_last_number", f"UPDATE sessions SET ended_seq = NULL WHERE id = {ENDED}"),
    ("no_message_after_the_end", f"UPDATE sessions SET ended_seq = ended_seq - 1 WHERE id = {ENDED}"),
    (
        "ledger_sums_to_zero",
        f"UPDATE ledger_entries SET amount = amount - 1 WHERE transaction_id = {CHARGED} AND account = 'payable'",
    ),
    ("subscription_balances", "UPDATE subscriptions SET voice_calls_remaining = voice_calls_remaining + 1"),
    ("wallet_balances", "UPDATE wallets SET balance = balance + 1"),
    ("wallet_balances", "DELETE FROM wallets"),
    (
        "consumed_balances",
        f"""
        UPDATE ledger_entries SET tenant_id = (SELECT max(id) FROM tenants)
        WHERE transaction_id = {CHARGED} AND account = 'consumed'
        """,
    ),
    (
        "charged_session_has_begun",
        f"""
        ALTER TABLE sessions DROP CONSTRAINT sessions_charged_check;
        UPDATE sessions SET activated_at = NULL, connected_at = NULL WHERE id = {ENDED}
        """,
    ),
    ("units_counted", f"UPDATE sessions SET units_charged = units_charged + 1 WHERE id = {ENDED}"),
    ("units_within_allowance", f"UPDATE sessions SET allowance_units = units_charged - 1 WHERE id = {ENDED}"),
    ("units_numbered", "UPDATE ledger_transactions SET unit = 3 WHERE kind = 'charge' AND unit = 2"),
    ("units_numbered", "UPDATE ledger_transactions SET unit = 2 WHERE kind = 'legacy'"),
    ("no_unit_charged_twice", "UPDATE ledger_transactions SET unit = 1 WHERE kind = 'charge' AND unit = 2"),
    ("legacy_bill_has_no_session", f"{ENDED_AGAIN} WHERE id = {BILLED}"),
    (
        "legacy_bill_has_no_session",
        f"UPDATE appointments SET status = 'CANCELLED' WHERE id = {BILLED}",
    ),
    (
        "unit_taken_once",
        "UPDATE subscriptions SET patient_id = (SELECT max(patient_id) FROM subscriptions)",
    ),
    (
        "unit_taken_once",
        f"""
        UPDATE ledger_entries SET amount = 2 * amount
        WHERE transaction_id = {CHARGED} AND account IN ('subscription', 'consumed');
        UPDATE subscriptions s SET video_calls_remaining = video_calls_remaining - 1 FROM ledger_entries e
        WHERE e.subscription_id = s.id AND e.transaction_id = {CHARGED}
        """,
    ),
    (
        "unit_paid_once",
        f"""
        INSERT INTO ledger_entries (tenant_id, transaction_id, account, doctor_id, commodity, amount)
        SELECT tenant_id, transaction_id, account, doctor_id, commodity, amount FROM ledger_entries
        WHERE transaction_id = {CHARGED} AND account IN ('wallet', 'payable');
        UPDATE wallets w SET balance = balance + amount FROM ledger_entries e
        WHERE w.doctor_id = e.doctor_id AND e.transaction_id = {CHARGED}
        """,
    ),
    ("unit_paid_once", "UPDATE sessions SET doctor_id = (SELECT max(doctor_id) FROM sessions) WHERE status = 'ended'"),
    ("unit_paid_once", "UPDATE appointments SET status = 'COMPLETED' WHERE status = 'NO_SHOW'"),
    (
        "refund_reverses_one_charge",
        f"""
        UPDATE ledger_entries SET amount = 2 * amount
        WHERE transaction_id = {REFUND} AND account IN ('subscription', 'consumed');
        UPDATE subscriptions s SET text_sessions_remaining = text_sessions_remaining + 1 FROM ledger_entries e
        WHERE e.subscription_id = s.id AND e.transaction_id = {REFUND}
        """,
    ),
    (
        "refund_reverses_one_charge",
        f"""
        ALTER TABLE ledger_transactions DROP CONSTRAINT ledger_transactions_reverses_key;
        UPDATE ledger_transactions SET reverses = {CHARGED} WHERE kind = 'refund'
        """,
    ),
    (
        "refund_reverses_one_charge",
        f"UPDATE ledger_transactions SET session_id = {LIVE} WHERE id = {REFUND}",
    ),
    (
        "delivery_ends_once",
        """
        ALTER TABLE outbox_deliveries DROP CONSTRAINT outbox_deliveries_one_ending_check;
        UPDATE outbox_deliveries SET dead_at = clock() WHERE dispatched_at IS NOT NULL
        """,
    ),
]


@pytest.mark.parametrize(("name", "sql"), BREAKS, ids=[name for name, _ in BREAKS])
async def test_what_is_broken_is_found_and_nothing_else(busy: "asyncpg.Connection[Any]", name: str, sql: str) -> None:
    breaking = busy.transaction()
    await breaking.start()
    try:
        await busy.execute(BY_HAND + sql)
        (finding,) = (await audit(busy)).violated
    finally:
        await breaking.rollback()
    assert finding.invariant.name == name
    assert finding.violations >= len(finding.examples) > 0
    kinds = {example.partition(":")[0] for example in finding.examples}
    assert kinds == {finding.invariant.subject}


def test_each_is_broken_by_some_test() -> None:
    assert {name for name, _ in BREAKS} == {invariant.name for invariant in INVARIANTS}


async def test_of_many_violations_all_are_counted_and_the_first_are_named(
    clinic: Clinic, owner: "asyncpg.Connection[Any]"
) -> None:
    appointments = [await clinic.appointment() for _ in range(12)]
    await owner.execute("ALTER TABLE appointments DROP CONSTRAINT appointments_in_progress_has_session_check")
    await owner.execute(BY_HAND + "UPDATE appointments SET status = 'IN_PROGRESS'")
    (finding,) = (await audit(owner)).violated
    assert finding.violations == 12
    assert finding.examples == [f"appointment:{id_}" for id_ in appointments[:EXAMPLES]]


async def test_all_statements_see_the_same_moment(clinic: Clinic, owner: "asyncpg.Connection[Any]") -> None:
    session = await clinic.session()
    async with snapshot(clinic.database, 60) as connection:
        assert await violations(connection) == {}
        await owner.execute(BY_HAND + "UPDATE appointments SET status = 'COMPLETED'")
        assert await violations(connection) == {}
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("UPDATE appointments SET status = 'COMPLETED'")
    assert await violations(owner) == {"live_session_has_appointment_in_progress": [f"session:{session.ref.id}"]}


async def test_it_may_take_longer_than_other_statements_but_not_for_ever(urls: Urls) -> None:
    hasty = Database(urls.app, application="hasty", timeouts={"statement_timeout": "50ms"})
    async with snapshot(hasty, 60) as connection:
        await connection.execute("SELECT pg_sleep(0.2)")
        assert await connection.fetchval("SHOW transaction_timeout") == "0"
    with pytest.raises((asyncpg.QueryCanceledError, TimeoutError)):
        async with snapshot(hasty, 1) as connection:
            await connection.execute("SELECT pg_sleep(30)")
    await hasty.close()
