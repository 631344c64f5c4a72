"""`sessiongate logs` on a real database."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import sessiongate
from tests.clinic import Clinic
from tests.conftest import Urls

ID = "550e8400-e29b-41d4-a716-446655440000"

INSERT = """
    INSERT INTO log_lines (at, level, urgent, event, category, component, service, correlation_id, user_id, session_id,
                           tenant_id, line)
    SELECT clock() - age, level, level = 'error', event, category, component, 'api', correlation_id, 5, 7, 3,
        jsonb_build_object('timestamp', to_char(clock() - age, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), 'level', level,
            'event', event, 'component', component, 'reason', 'out of paper', 'number', number)::text
    FROM (VALUES (interval '2 hours', 'info', 'printed', 'message', 'chat', $1, 1),
                 (interval '1 hour', 'error', 'jammed', 'error', 'outbox', NULL, 2),
                 (interval '1 minute', 'info', 'printed', 'message', 'chat', NULL, 3))
        AS l (age, level, event, category, component, correlation_id, number)
"""


@pytest.fixture
async def known(clinic: Clinic, urls: Urls) -> dict[str, str]:
    await clinic.fetch(INSERT, ID)
    return {"SESSIONGATE_DATABASE_URL": urls.app, "COLUMNS": "200"}


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ("", [1, 2, 3]),
        ("--limit 1", [3]),
        ("--since 90m", [2, 3]),
        ("--since 90m --until 30m", [2]),
        ("--until 2020-01-01T00:00:00Z", []),
        ("--level warning", [2]),
        ("--component outbox", [2]),
        ("--category message", [1, 3]),
        ("--event jammed", [2]),
        (f"--correlation-id {ID}", [1]),
        ("--user 5 --session 7 --tenant 3", [1, 2, 3]),
        ("--user 6", []),
        ("--session 8", []),
        ("--tenant 4", []),
    ],
)
def test_lines_are_found_by_all_that_is_asked_for(
    known: dict[str, str], tmp_path: Path, options: str, numbers: list[int]
) -> None:
    found = sessiongate(tmp_path, "logs", "search", *options.split(), "--json", env=known)
    assert found.returncode == 0, found.stderr
    assert [line["number"] for line in json.loads(found.stdout)] == numbers


def test_a_line_is_shown_as_one(known: dict[str, str], tmp_path: Path) -> None:
    shown = sessiongate(tmp_path, "logs", "search", "--level", "error", env=known | {"COLUMNS": "40"})
    assert shown.returncode == 0, shown.stderr
    (line,) = shown.stdout.splitlines()
    assert line.endswith("error   outbox jammed number=2 reason=out of paper")


async def test_a_line_gives_the_terminal_no_orders(clinic: Clinic, known: dict[str, str], tmp_path: Path) -> None:
    await clinic.fetch(
        "INSERT INTO log_lines (at, level, urgent, event, component, service, line)"
        " SELECT at, 'critical', urgent, event, component, service,"
        r" replace(line, 'out of paper', '\u001b]0;owned\u0007') FROM log_lines WHERE level = 'error'"
    )
    shown = sessiongate(tmp_path, "logs", "search", "--level", "critical", env=known)
    assert shown.stdout.endswith("reason=\\x1b]0;owned\\x07\n")


def test_lines_are_counted_by_level_and_event(known: dict[str, str], tmp_path: Path) -> None:
    counted = json.loads(sessiongate(tmp_path, "logs", "stats", "--json", env=known).stdout)
    assert counted == [
        {"level": "info", "event": "printed", "category": "message", "lines": 2},
        {"level": "error", "event": "jammed", "category": "error", "lines": 1},
    ]
    shown = sessiongate(tmp_path, "logs", "stats", "--since", "90m", env=known)
    assert [line.split("│")[1:5] for line in shown.stdout.splitlines() if "│" in line] == [
        [" error ", " jammed  ", " error    ", " 1     "],
        [" info  ", " printed ", " message  ", " 1     "],
    ]


COMMANDS = pytest.mark.parametrize("options", ["search", "search --json", "stats", "stats --json"])


@COMMANDS
def test_where_nothing_is_found_it_is_said_since_when_lines_are_kept(
    known: dict[str, str], tmp_path: Path, options: str
) -> None:
    asked = sessiongate(tmp_path, "logs", *options.split(), "--until", "2020-01-01T00:00:00Z", env=known)
    assert asked.returncode == 0
    assert re.fullmatch(r"Nothing found\. Lines are kept since \d{4}-\d\d-\d\d \d\d:\d\d UTC\.\n", asked.stderr)
    assert "--json" not in options or json.loads(asked.stdout) == []
    found = sessiongate(tmp_path, "logs", *options.split(), env=known)
    assert found.stderr == ""


@COMMANDS
def test_where_no_lines_are_kept_it_is_said(urls: Urls, tmp_path: Path, options: str) -> None:
    asked = sessiongate(tmp_path, "logs", *options.split(), env={"SESSIONGATE_DATABASE_URL": urls.app})
    assert asked.returncode == 0
    assert asked.stderr == "No lines are kept: set SESSIONGATE_LOG_SEARCH_HOURS where API and worker run.\n"


@pytest.mark.parametrize("options", ["search --since yesterday", "stats --until 2030-01-01"])
def test_a_time_that_is_none_is_refused_in_a_sentence(known: dict[str, str], tmp_path: Path, options: str) -> None:
    refused = sessiongate(tmp_path, "logs", *options.split(), env=known)
    assert refused.returncode == 1
    assert "is a span such as 90m, 24h or 7d, or a timestamp with an offset." in refused.stderr
