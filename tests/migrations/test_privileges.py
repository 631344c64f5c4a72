from typing import Any

import asyncpg
import pytest

from libs.domain.tables import metadata
from services.cli.embedded import LOGIN
from tests.clinic import Clinic

CHANGED_IN_PLACE = {
    *("tenants", "users", "subscriptions", "appointments", "busy_intervals", "sessions", "conversations"),
    *("participants", "reactions", "conversion_runs", "notifications"),
}
ONLY_ADDED_TO = {"appointment_parties", "messages", "conversion_attempts", "outbox_events", "audit_log"}
ONLY_ADDED_TO |= {"ledger_transactions", "ledger_entries"}
ONLY_READ = {"payout_rates", "wallets"}
SWEPT = {
    "workers": {"INSERT", "UPDATE", "DELETE"},
    "conversion_samples": {"INSERT", "DELETE"},
    "idempotency_keys": {"INSERT", "DELETE"},
    "socket_tickets": {"INSERT", "DELETE"},
    "api_processes": {"INSERT", "UPDATE", "DELETE"},
    "socket_slots": {"INSERT", "DELETE"},
    "flag_overrides": {"INSERT", "UPDATE", "DELETE"},
    "decisions": {"INSERT", "DELETE"},
    "log_lines": {"INSERT", "DELETE"},
    "outbox_deliveries": {"INSERT", "UPDATE", "DELETE"},
    "webhook_endpoints": {"INSERT", "UPDATE", "DELETE"},
    "webhook_secrets": {"INSERT", "UPDATE", "DELETE"},
    "decision_totals": {"INSERT", "UPDATE", "DELETE"},
    "cron_runs": {"INSERT", "DELETE"},
    "audits": {"INSERT", "DELETE"},
    "alerts": {"INSERT", "UPDATE", "DELETE"},
}

PRIVILEGES = """
    SELECT relname, array_agg(privilege) FROM pg_class,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) privilege
    WHERE relkind IN ('r', 'p', 'v', 'm') AND relnamespace = 'public'::regnamespace
        AND (has_table_privilege($1, pg_class.oid, privilege)
            OR privilege IN ('SELECT', 'INSERT', 'UPDATE') AND has_any_column_privilege($1, pg_class.oid, privilege))
    GROUP BY relname
"""


async def test_the_services_may_do_to_each_table_what_they_need_and_no_more(owner: "asyncpg.Connection[Any]") -> None:
    granted = {name: set(privileges) for name, privileges in await owner.fetch(PRIVILEGES, LOGIN)}
    wanted = {name: {"INSERT", "UPDATE"} for name in CHANGED_IN_PLACE}
    wanted |= {name: {"INSERT"} for name in ONLY_ADDED_TO} | SWEPT
    wanted |= {name: set() for name in ONLY_READ}
    assert wanted.keys() == metadata.tables.keys()
    assert {name: granted[name] - {"SELECT"} for name in wanted} == wanted
    # What is not ours: Alembic's own table and the clock of the tests.
    assert all(granted[name] == {"SELECT"} for name in granted.keys() - wanted.keys())


async def test_the_services_own_nothing_and_administer_nothing(owner: "asyncpg.Connection[Any]") -> None:
    role = await owner.fetchrow(
        "SELECT oid, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls FROM pg_roles"
        " WHERE rolname = $1",
        LOGIN,
    )
    assert role is not None
    assert [name for name, value in role.items() if value is True] == []
    assert await owner.fetchval("SELECT count(*) FROM pg_class WHERE relowner = $1", role["oid"]) == 0
    assert await owner.fetchval("SELECT count(*) FROM pg_auth_members WHERE member = $1", role["oid"]) == 0


async def test_the_services_may_call_nothing_that_runs_with_the_rights_of_the_owner(
    owner: "asyncpg.Connection[Any]",
) -> None:
    ours = await owner.fetch(
        "SELECT proname, has_function_privilege($1, oid, 'EXECUTE') AS callable FROM pg_proc"
        " WHERE prosecdef AND pronamespace = 'public'::regnamespace",
        LOGIN,
    )
    assert {row["proname"]: row["callable"] for row in ours} == {"ledger_entries_apply": False}


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE mine (id bigint)",
        "CREATE FUNCTION clock() RETURNS timestamptz LANGUAGE sql AS 'SELECT now()'",
        "CREATE OR REPLACE FUNCTION clock() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT now()'",
        "CREATE SCHEMA mine",
        "DROP TABLE messages",
        "DROP FUNCTION clock()",
        "ALTER TABLE appointments DISABLE TRIGGER appointments_follow_transitions",
        "ALTER TABLE sessions DROP CONSTRAINT sessions_status_check",
        "SET session_replication_role = replica",
        "TRUNCATE workers",
        "TRUNCATE audit_log",
        "UPDATE audit_log SET action = 'nothing'",
        "DELETE FROM audit_log",
        "UPDATE conversion_attempts SET result = 'skipped'",
        "DELETE FROM conversion_attempts",
        "UPDATE messages SET body = ''",
        "DELETE FROM messages",
        "UPDATE outbox_events SET payload = '{}'",
        "DELETE FROM appointments",
        "DELETE FROM sessions",
        "UPDATE alembic_version SET version_num = '0000'",
    ],
)
async def test_the_database_refuses_the_services(clinic: Clinic, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await clinic.fetch(statement)


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_log SET action = ''", "DELETE FROM audit_log", "TRUNCATE audit_log"]
)
async def test_not_even_the_owner_rewrites_the_audit_log(owner: "asyncpg.Connection[Any]", statement: str) -> None:
    with pytest.raises(asyncpg.RestrictViolationError, match="only added to"):
        await owner.execute(statement)
    await owner.execute("INSERT INTO audit_log (action, subject) VALUES ('looked', 'user:1')")
