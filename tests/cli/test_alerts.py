"""`sessiongate alerts` on a real database."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from libs.domain import alerts
from tests.cli.conftest import sessiongate
from tests.clinic import Clinic
from tests.conftest import Urls

START = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def known(urls: Urls) -> dict[str, str]:
    return {"SESSIONGATE_DATABASE_URL": urls.app, "COLUMNS": "200"}


@pytest.fixture
async def told(clinic: Clinic) -> None:
    """One alert that is resolved, and one that fires."""
    for name, resolved_at in (("OutboxLag", START + timedelta(hours=1)), ("TargetDown", None)):
        alert = alerts.Told(
            fingerprint=name,
            name=name,
            severity=alerts.Severity.CRITICAL,
            component="outbox",
            metric=None,
            value=None,
            threshold=None,
            labels={"alertname": name},
            annotations={"summary": f"This is {name}."},
            started_at=START,
            resolved_at=resolved_at,
        )
        await alerts.keep(clinic.database, clinic.metrics, "test", [alert])


@pytest.mark.usefixtures("told")
def test_alerts_are_listed_the_newest_first(known: dict[str, str], tmp_path: Path) -> None:
    listed = json.loads(sessiongate(tmp_path, "alerts", "list", "--json", env=known).stdout)
    assert [(each["name"], each["status"], each["resolved_at"]) for each in listed] == [
        ("TargetDown", "firing", None),
        ("OutboxLag", "resolved", "2030-01-01T01:00:00Z"),
    ]
    table = sessiongate(tmp_path, "alerts", "list", "--limit", "1", env=known)
    assert (table.returncode, table.stderr) == (0, "")
    assert "This is TargetDown." in table.stdout
    assert "OutboxLag" not in table.stdout
    assert "There are more" in table.stdout


@pytest.mark.usefixtures("told")
def test_those_that_fire_are_listed_alone(known: dict[str, str], tmp_path: Path) -> None:
    listed = json.loads(sessiongate(tmp_path, "alerts", "list", "--firing", "--json", env=known).stdout)
    assert [each["name"] for each in listed] == ["TargetDown"]


@pytest.mark.usefixtures("clinic")
def test_silence_is_put_into_words(known: dict[str, str], tmp_path: Path) -> None:
    assert sessiongate(tmp_path, "alerts", "list", "--firing", env=known).stdout == "No alert fires.\n"
    assert sessiongate(tmp_path, "alerts", "list", env=known).stdout == "No alert was told.\n"
