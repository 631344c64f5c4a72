"""`sessiongate outbox` on a real database."""

import json
from pathlib import Path

import pytest

from libs.domain.outbox.append import append
from libs.domain.outbox.events import EventName
from libs.domain.transaction import transaction
from tests.cli.conftest import sessiongate
from tests.clinic import Clinic
from tests.conftest import Urls
from tests.receiver import register


@pytest.fixture
def known(urls: Urls) -> dict[str, str]:
    return {"SESSIONGATE_DATABASE_URL": urls.app, "COLUMNS": "200"}


@pytest.fixture
async def dead(clinic: Clinic) -> list[int]:
    """Two deliveries to an endpoint and two notifications that were given up, in this order."""
    await register(clinic.database, clinic.operator, "https://example.org/")
    for number in range(2):
        async with transaction(clinic.database, clinic.bell) as tx:
            await append(
                tx, EventName.SESSION_ENDED, tenant_id=clinic.tenant_id, aggregate=f"session:{number}", payload={}
            )
    rows = await clinic.fetch(
        """
        UPDATE outbox_deliveries SET dead_at = clock(), attempts = 6, last_error = 'The receiver answered 500.'
        RETURNING id, consumer
        """
    )
    return [row["id"] for row in sorted(rows, key=lambda row: (row["consumer"] == "notifications", row["id"]))]


async def waiting(clinic: Clinic) -> list[int]:
    rows = await clinic.fetch("SELECT id FROM outbox_deliveries WHERE dead_at IS NULL AND attempts = 0 ORDER BY id")
    return [row["id"] for row in rows]


def test_dead_deliveries_are_listed_with_the_reason(dead: list[int], known: dict[str, str], tmp_path: Path) -> None:
    listed = json.loads(sessiongate(tmp_path, "outbox", "dead", "--json", env=known).stdout)
    assert [each["id"] for each in listed] == sorted(dead, reverse=True)
    assert {each["last_error"] for each in listed} == {"The receiver answered 500."}
    assert all(each["dead_at"].endswith("Z") for each in listed)
    some = sessiongate(tmp_path, "outbox", "dead", "--consumer", "notifications", "--limit", "1", env=known)
    assert some.returncode == 0
    assert f" {max(dead[2:])} " in some.stdout
    assert "The receiver answered 500." in some.stdout
    assert "There are more" in some.stdout


async def test_named_deliveries_are_replayed_and_audited(
    clinic: Clinic, dead: list[int], known: dict[str, str], tmp_path: Path
) -> None:
    said = sessiongate(tmp_path, "outbox", "replay", *map(str, dead[:2]), env=known)
    assert (said.returncode, said.stdout, said.stderr) == (0, "2 will be tried again within a second.\n", "")
    assert await waiting(clinic) == sorted(dead[:2])
    entries = await clinic.fetch("SELECT * FROM audit_log WHERE action = 'delivery_replayed' ORDER BY id")
    assert [(entry["tenant_id"], entry["actor_id"], entry["subject"]) for entry in entries] == [
        (clinic.tenant_id, None, f"delivery:{each}") for each in sorted(dead[:2])
    ]


async def test_all_deliveries_of_a_consumer_are_replayed_and_then_all(
    clinic: Clinic, dead: list[int], known: dict[str, str], tmp_path: Path
) -> None:
    of_one = sessiongate(tmp_path, "outbox", "replay", "--all", "--consumer", "notifications", "--json", env=known)
    assert json.loads(of_one.stdout) == {"replayed": sorted(dead[2:])}
    assert await waiting(clinic) == sorted(dead[2:])
    assert sessiongate(tmp_path, "outbox", "replay", "--all", env=known).returncode == 0
    assert await waiting(clinic) == sorted(dead)
    assert sessiongate(tmp_path, "outbox", "dead", env=known).stdout == "No delivery was given up.\n"


async def test_what_is_not_dead_is_not_replayed_and_named(
    clinic: Clinic, dead: list[int], known: dict[str, str], tmp_path: Path
) -> None:
    said = sessiongate(tmp_path, "outbox", "replay", str(dead[0]), "999", env=known)
    assert (said.returncode, said.stderr) == (1, "No dead delivery has the id 999.\n")
    assert await waiting(clinic) == [dead[0]]


@pytest.mark.parametrize("arguments", [(), ("7", "--all"), ("7", "--consumer", "notifications"), ("0",), ("all",)])
def test_what_is_meant_must_be_said(known: dict[str, str], tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused = sessiongate(tmp_path, "outbox", "replay", *arguments, env=known)
    assert refused.returncode in (1, 2)
    assert (refused.stdout, bool(refused.stderr)) == ("", True)
