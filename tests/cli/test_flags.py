"""`sessiongate flags …` on a real database, as people run it."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Protocol

import pytest

from libs.guardrails import Flag
from tests.cli.conftest import sessiongate
from tests.clinic import Clinic
from tests.conftest import Urls

CHAT = Flag.ENFORCE_SESSION_GATED_CHAT
BILLING = Flag.ENFORCE_SESSION_GATED_BILLING
TRIGGERS = Flag.DISABLE_LEGACY_APPOINTMENT_TRIGGERS


class Run(Protocol):
    def __call__(self, *arguments: str, **environment: str) -> CompletedProcess[str]: ...


@pytest.fixture
def run(urls: Urls, tmp_path: Path) -> Run:
    """Runs a command of `sessiongate flags` on the test's database."""
    known = {"SESSIONGATE_HOME": str(tmp_path / "home"), "SESSIONGATE_DATABASE_URL": urls.app, "COLUMNS": "200"}

    def run(*arguments: str, **environment: str) -> CompletedProcess[str]:
        return sessiongate(tmp_path, "flags", *arguments, env=known | environment)

    return run


def told(completed: CompletedProcess[str]) -> str:
    assert (completed.returncode, completed.stderr) == (0, "")
    return completed.stdout


def answer(completed: CompletedProcess[str]) -> Any:
    return json.loads(told(completed))


def refusal(completed: CompletedProcess[str]) -> str:
    assert completed.returncode in (1, 2)
    assert completed.stdout == ""
    return completed.stderr


async def test_a_flag_is_set_for_all_tenants_for_one_and_in_stages(clinic: Clinic, run: Run) -> None:
    tenant = clinic.tenant_id
    set_ = answer(run("set", CHAT, "on", "--json"))
    assert set_ == {
        "flag": CHAT,
        "tenant_id": None,
        "target": {"default": True, "share": None, "allow": {}},
        "tripwire": None,
        "before": None,
    }
    staged = run(
        *("set", CHAT.lower(), "on", "--share", "0.25", "--allow", f"tenant:{tenant}", "--default", "off"),
        *("--tripwire", "0.2:3"),
    )
    assert f"{CHAT} is on for tenant {tenant}, 25% of tenants, else off; it was on." in told(staged)
    assert f"{CHAT} is off for tenant {tenant}; it was without an override." in told(
        run("set", CHAT, "off", "--tenant", str(tenant))
    )
    rows = await clinic.fetch("SELECT tenant_id, target, tripwire FROM flag_overrides ORDER BY tenant_id NULLS FIRST")
    assert [tuple(row) for row in rows] == [
        (
            None,
            {"default": False, "share": 0.25, "allow": {"tenant": [tenant]}},
            {"share": 0.2, "minutes": 3, "minimum": 50},
        ),
        (tenant, {"default": False, "share": None, "allow": {}}, None),
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((CHAT, "off", "--share", "0.5"), "--share and --allow tell whom a flag is on for"),
        ((CHAT, "on", "--default", "off"), "--default is for tenants that --share and --allow do not reach"),
        ((CHAT, "on", "--share", "0.5", "--tenant", "1"), "One tenant has a flag on or off"),
        ((CHAT, "on", "--allow", "doctor:3"), "--allow names a tenant, such as tenant:3."),
        ((CHAT, "on", "--allow", "tenant:987654"), "There is no tenant 987654."),
        ((CHAT, "on", "--tenant", "987654"), "There is no tenant 987654."),
        ((TRIGGERS, "on", "--tripwire", "0.1"), f"{TRIGGERS} refuses no requests when it is on, so it has no tripwire"),
        ((CHAT, "on", "--tripwire", "0.1:5:50:9"), "--tripwire is a share from 0 to below 1"),
        (("FLY", "on"), "FLY"),
    ],
)
async def test_what_makes_no_sense_is_refused_with_a_sentence(
    clinic: Clinic, run: Run, arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refusal(run("set", *arguments))
    assert await clinic.fetchval("SELECT count(*) FROM audit_log") == 0


async def test_the_list_tells_values_and_origins_beside_the_environment(clinic: Clinic, run: Run) -> None:
    tenant = str(clinic.tenant_id)
    for arguments in ((CHAT, "off"), (CHAT, "on", "--tenant", tenant), (TRIGGERS, "on", "--share", "1")):
        told(run("set", *arguments))
    environment = {CHAT.value: "true", BILLING.value: "true"}

    def values(*options: str) -> list[tuple[Any, ...]]:
        rows = answer(run("list", "--json", *options, **environment))["flags"]
        return [(row["flag"], row["enabled"], row["origin"], row["environment"]) for row in rows]

    assert values()[:3] == [
        (CHAT, False, "everyone", True),
        (BILLING, True, "environment", True),
        (TRIGGERS, False, "environment", False),
    ]
    assert values("--tenant", tenant)[:3] == [
        (CHAT, True, "tenant", True),
        (BILLING, True, "environment", True),
        (TRIGGERS, True, "share", False),
    ]
    assert len(answer(run("list", "--json"))["overrides"]) == 3
    table = told(run("list", **environment))
    assert "on for 100% of tenants, else as in the environment" in table
    assert f"tenant {tenant}" in table
    assert "There is no tenant 987654." in refusal(run("list", "--tenant", "987654"))


async def test_the_history_tells_who_changed_what(clinic: Clinic, run: Run) -> None:
    told(run("set", CHAT, "on", "--tripwire", "0.1"))
    told(run("set", BILLING, "on"))
    told(run("set", CHAT, "off"))
    told(run("rollback", CHAT, "--yes"))
    story = answer(run("history", CHAT, "--json"))
    assert [(line["action"], line["flag"], line["tenant_id"], line["actor_id"]) for line in story] == [
        ("flag_cleared", CHAT, None, None),
        ("flag_changed", CHAT, None, None),
        ("flag_changed", CHAT, None, None),
    ]
    assert story[0]["before"] == story[1]["after"]
    assert story[1]["before"] == story[2]["after"]
    assert story[2]["before"] is None
    assert len(answer(run("history", "--json"))) == 4
    assert len(answer(run("history", "--json", "--limit", "1"))) == 1
    table = told(run("history"))
    assert BILLING in table
    assert "command line" in table


async def test_rollback_clears_everything_and_says_what_rules_now(clinic: Clinic, run: Run) -> None:
    told(run("set", CHAT, "off"))
    told(run("set", BILLING, "on", "--tenant", str(clinic.tenant_id)))
    assert "Aborted" in run("rollback").stderr  # nobody is there to say yes
    assert await clinic.fetchval("SELECT count(*) FROM flag_overrides") == 2

    said = told(run("rollback", "--yes", **{CHAT.value: "true"}))

    assert "These overrides are cleared." in said
    assert f"tenant {clinic.tenant_id}" in said
    assert f"{CHAT} is now on, as the environment says." in said
    assert f"{BILLING} is now off, as the environment says." in said
    assert await clinic.fetchval("SELECT count(*) FROM flag_overrides") == 0
    assert "There was no override to clear." in told(run("rollback", "--yes"))


async def test_rollback_can_be_confined_and_says_what_remains(clinic: Clinic, run: Run) -> None:
    told(run("set", CHAT, "on"))
    told(run("set", CHAT, "off", "--tenant", str(clinic.tenant_id)))
    cleared = answer(run("rollback", CHAT, "--tenant", str(clinic.tenant_id), "--yes", "--json"))
    assert [each["tenant_id"] for each in cleared["cleared"]] == [clinic.tenant_id]
    assert [(row["flag"], row["enabled"], row["origin"]) for row in cleared["flags"]] == [(CHAT, True, "everyone")]
