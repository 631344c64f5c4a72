"""`sessiongate billing refund` on a real database, as people run it."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Protocol

import pytest

from tests.cli.conftest import sessiongate
from tests.clinic import MINUTE, Clinic, LiveSession
from tests.conftest import Urls


class Run(Protocol):
    def __call__(self, *arguments: str) -> CompletedProcess[str]: ...


@pytest.fixture
def run(urls: Urls, tmp_path: Path) -> Run:
    known = {"SESSIONGATE_HOME": str(tmp_path), "SESSIONGATE_DATABASE_URL": urls.app, "COLUMNS": "200"}
    known |= {"SESSIONGATE_REDIS_URL": urls.redis}

    def run(*arguments: str) -> CompletedProcess[str]:
        return sessiongate(tmp_path, "billing", "refund", *arguments, env=known)

    return run


@pytest.fixture
async def billed(clinic: Clinic) -> LiveSession:
    """A session of which three units were charged."""
    live = await clinic.session()
    await clinic.begin(live, ago=31 * MINUTE)
    await clinic.settle()
    return live


UNITS = "SELECT text_sessions_remaining FROM subscriptions WHERE patient_id = $1"


async def test_one_unit_is_taken_back_and_then_the_rest(clinic: Clinic, billed: LiveSession, run: Run) -> None:
    one = run(billed.context, "--unit", "2", "--reason", "the line was bad")
    assert (one.returncode, one.stderr) == (0, "")
    assert "1 unit refunded." in one.stdout
    assert await clinic.fetchval(UNITS, billed.patient.user_id) == 8
    assert await clinic.fetchval("SELECT balance FROM wallets") == 2 * 350_000

    rest = json.loads(run(billed.context, "--json").stdout)
    assert (rest["units_refunded"], [item["unit"] for item in rest["items"]]) == (2, [1, 3])
    assert await clinic.fetchval(UNITS, billed.patient.user_id) == 10
    log = await clinic.fetch("SELECT actor_id, subject, details ->> 'reason' AS reason FROM audit_log ORDER BY id")
    assert [tuple(row) for row in log] == [
        (None, billed.context, "the line was bad"),
        (None, billed.context, None),
    ]


async def test_whatever_cannot_be_refunded_is_said_in_a_sentence(clinic: Clinic, billed: LiveSession, run: Run) -> None:
    for arguments, sentence in {
        ("text_session:0",): "'text_session:0' is neither a session such as text_session:7 nor an appointment's id.\n",
        ("call_session:1",): "There is no call_session:1.\n",
        ("999",): "There is no appointment 999.\n",
        (billed.context, "--unit", "9"): "Nothing was charged for this, or all of it was refunded before.\n",
        (str(billed.appointment_id),): "Nothing was charged for this, or all of it was refunded before.\n",
    }.items():
        refused = run(*arguments)
        assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", sentence)
    assert await clinic.fetchval(UNITS, billed.patient.user_id) == 7
