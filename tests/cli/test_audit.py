"""`sessiongate audit` for people and for machines."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import asyncpg
import pytest

from libs.domain.invariants import INVARIANTS
from tests.cli.conftest import sessiongate
from tests.clinic import Clinic
from tests.conftest import Urls

Run = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def run(urls: Urls, tmp_path: Path) -> Run:
    known = {
        "SESSIONGATE_HOME": str(tmp_path),
        "SESSIONGATE_DATABASE_URL": urls.app,
        "SESSIONGATE_REDIS_URL": urls.redis,
        "COLUMNS": "250",
    }
    return lambda *arguments: sessiongate(tmp_path, "audit", *arguments, env=known)


async def test_a_clinic_that_is_well_passes(clinic: Clinic, run: Run) -> None:
    await clinic.session()
    passed = run("--json")
    assert (passed.returncode, passed.stderr) == (0, "")
    answer = json.loads(passed.stdout)
    assert answer.keys() == {"ok", "checked_at", "invariants"}
    assert answer["ok"] is True
    assert answer["checked_at"].endswith("Z")
    at = datetime.fromisoformat(answer["checked_at"])
    assert abs(await clinic.fetchval("SELECT clock()") - at) < timedelta(minutes=1)
    assert answer["invariants"] == [{"name": each.name, "violations": 0, "examples": []} for each in INVARIANTS]

    shown = run()
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [
        each.name for each in INVARIANTS if each.name not in shown.stdout or each.sentence not in shown.stdout
    ] == []
    assert "All are kept, as of " in shown.stdout


async def test_a_violation_is_told_and_fails(clinic: Clinic, owner: "asyncpg.Connection[Any]", run: Run) -> None:
    session = await clinic.session()
    await owner.execute("UPDATE conversations SET last_seq = 7 WHERE session_id = $1", session.ref.id)
    conversation_id = await clinic.fetchval("SELECT id FROM conversations")

    failed = run("--json")
    assert (failed.returncode, failed.stderr) == (1, "")
    answer = json.loads(failed.stdout)
    assert answer["ok"] is False
    assert [each for each in answer["invariants"] if each["violations"]] == [
        {"name": "messages_numbered", "violations": 1, "examples": [f"conversation:{conversation_id}"]}
    ]

    shown = run()
    assert shown.returncode == 1
    (line,) = [line for line in shown.stdout.splitlines() if "messages_numbered" in line]
    assert f"conversation:{conversation_id}" in line
    assert f"1 of {len(INVARIANTS)} are violated, as of " in shown.stdout
