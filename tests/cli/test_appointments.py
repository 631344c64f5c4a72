"""`sessiongate appointments …` on a real database, as people and cron run it."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Protocol

import pytest

from tests.cli.conftest import sessiongate
from tests.clinic import MINUTE, Clinic
from tests.conftest import Urls

EXECUTE = ("recover-sessions", "--execute", "--json")


class Run(Protocol):
    def __call__(self, *arguments: str, **environment: str) -> CompletedProcess[str]: ...


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "home" / "logs" / "cli.jsonl"


@pytest.fixture
def run(urls: Urls, tmp_path: Path, log: Path) -> Run:
    """Runs a command of `sessiongate appointments` on the test's database."""
    (tmp_path / "elsewhere").mkdir()
    known = {
        "SESSIONGATE_HOME": str(log.parents[1]),
        "SESSIONGATE_DATABASE_URL": urls.app,
        "SESSIONGATE_REDIS_URL": urls.redis,
        "COLUMNS": "200",
    }

    def run(*arguments: str, **environment: str) -> CompletedProcess[str]:
        return sessiongate(tmp_path / "elsewhere", "appointments", *arguments, env=known | environment)

    return run


def answer(completed: CompletedProcess[str]) -> dict[str, Any]:
    assert (completed.returncode, completed.stderr) == (0, "")
    told: dict[str, Any] = json.loads(completed.stdout)
    return told


def logged(log: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == event]


async def test_what_is_due_is_converted_and_every_outcome_is_told(clinic: Clinic, run: Run, log: Path) -> None:
    good = await clinic.appointment()
    broken = await clinic.appointment(patient=await clinic.patient(units=None))

    told = answer(run("auto-start-sessions", "--json"))

    session_id = await clinic.fetchval("SELECT id FROM sessions WHERE appointment_id = $1", good)
    counts = {name: told[f"{name}_count"] for name in ("due", "attempted", "created", "skipped", "failed")}
    assert counts == {"due": 2, "attempted": 2, "created": 1, "skipped": 0, "failed": 1}
    assert told["runtime_ms"] > 0
    assert told["source"] == "APPOINTMENT"
    assert told["dry_run"] is False
    assert {item.pop("appointment_id"): item for item in told["appointments"]} == {
        good: {
            "result": "created",
            "session_id": session_id,
            "failure_reason": None,
            "error_message": None,
            "parked": False,
        },
        broken: {
            "result": "failed",
            "session_id": None,
            "failure_reason": "missing_doctor_or_patient",
            "error_message": "The patient has no unexpired subscription.",
            "parked": False,
        },
    }
    assert [line["run_id"] for line in logged(log, "appointment_auto_start_run")] == [told["run_id"]]
    assert {line["appointment_id"] for line in logged(log, "appointment_session_conversion")} == {good, broken}


async def test_for_people_there_are_tables(clinic: Clinic, run: Run) -> None:
    broken = await clinic.appointment(patient=await clinic.patient(units=None))
    shown = run("auto-start-sessions", "--verbose")
    assert shown.returncode == 0
    assert "due" in shown.stdout
    row = next(line for line in shown.stdout.splitlines() if str(broken) in line and "failed" in line)
    assert "missing_doctor_or_patient: The patient has no unexpired subscription." in row
    assert "unexpired" not in run("auto-start-sessions").stdout


async def test_a_limit_leaves_the_rest_for_later(clinic: Clinic, run: Run) -> None:
    for _ in range(3):
        await clinic.appointment()
    limited = answer(run("auto-start-sessions", "--limit", "2", "--json", SESSIONGATE_CONVERSION_BATCH_LIMIT="1"))
    assert (limited["due_count"], limited["created_count"]) == (3, 2)
    assert answer(run("auto-start-sessions", "--json"))["created_count"] == 1


async def test_a_dry_run_says_what_would_be_and_changes_nothing(clinic: Clinic, run: Run, log: Path) -> None:
    good = await clinic.appointment()
    everything = "SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM conversion_attempts),"
    everything += " (SELECT count(*) FROM conversion_runs), (SELECT xmin::text FROM appointments WHERE id = $1)"
    before = await clinic.fetchrow(everything, good)

    shown = run("recover-sessions")
    assert "would be" in shown.stdout
    assert "Nothing was changed. Add --execute to do it." in shown.stdout
    told = answer(run("recover-sessions", "--json"))

    assert told["dry_run"] is True
    assert [(item["appointment_id"], item["result"]) for item in told["appointments"]] == [(good, "created")]
    assert await clinic.fetchrow(everything, good) == before
    assert [line["dry_run"] for line in logged(log, "appointment_recovery_run")] == [True, True]


async def test_executing_twice_makes_one_session(clinic: Clinic, run: Run, log: Path) -> None:
    await clinic.appointment()
    assert [answer(run(*EXECUTE))["created_count"] for _ in range(2)] == [1, 0]
    assert await clinic.fetchval("SELECT count(*) FROM sessions") == 1
    assert [line["created_count"] for line in logged(log, "appointment_recovery_run")] == [1, 0]


async def test_an_appointment_with_a_session_is_left_alone(clinic: Clinic, run: Run) -> None:
    session = await clinic.session()
    everything = "SELECT a.xmin::text, s.xmin::text FROM appointments a JOIN sessions s ON s.id = a.session_id"
    before = await clinic.fetch(everything)
    assert answer(run(*EXECUTE))["appointments"] == []
    assert await clinic.fetch(everything) == before
    assert await clinic.fetchval("SELECT count(*) FROM sessions WHERE id = $1", session.ref.id) == 1


@pytest.mark.parametrize("lookback", ["yesterday", "-1h", "7w", "1.5h", ""])
def test_a_lookback_that_is_none_is_one_sentence(run: Run, lookback: str) -> None:
    refused = run("recover-sessions", f"--lookback={lookback}")
    assert refused.returncode == 1
    assert refused.stderr == "--lookback is a number of hours or days such as 24h or 7d, or the word all.\n"


async def test_a_lookback_reaches_as_far_as_it_says(clinic: Clinic, run: Run, owner: Any) -> None:
    await clinic.appointment()
    await owner.execute("UPDATE appointments SET starts_at = clock() - interval '30 hours', ends_at = clock()")
    found = {
        lookback: answer(run("recover-sessions", "--json", "--lookback", lookback))["due_count"]
        for lookback in ("24h", "29", "31h", "2d", "all")
    }
    assert found == {"24h": 0, "29": 0, "31h": 1, "2d": 1, "all": 1}


async def test_the_monitor_is_for_people_programs_and_alarms(clinic: Clinic, run: Run) -> None:
    told = answer(run("monitor-sessions", "--json", "--alert"))
    assert told["appointments_due_count"] == 0
    assert "parked, needs attention" in run("monitor-sessions").stdout

    for _ in range(5):
        await clinic.appointment(patient=await clinic.patient(units=None))
    await clinic.convert()
    all_failed = ("monitor-sessions", "--alert", "--json")
    assert run(*all_failed).returncode == 2
    for _ in range(5):
        await clinic.session()
    assert run(*all_failed, "--error-critical", "0.5", "--error-warning", "0.4").returncode == 1
    assert run(*all_failed, "--error-critical", "0.5", "--error-warning", "0.5").returncode == 0
    assert run("monitor-sessions").returncode == 0


def test_without_anything_running_there_is_one_sentence(tmp_path: Path) -> None:
    refused = sessiongate(tmp_path, "appointments", "monitor-sessions", env={"SESSIONGATE_HOME": str(tmp_path)})
    assert refused.returncode == 1
    assert refused.stderr == (
        f"Sessiongate is not running (home {tmp_path}). Start it with `sessiongate up`,"
        " or set SESSIONGATE_DATABASE_URL and SESSIONGATE_REDIS_URL.\n"
    )


async def test_legacy_commands_say_what_they_did(clinic: Clinic, run: Run, log: Path) -> None:
    over = await clinic.appointment(starts_in=-40 * MINUTE)
    soon = await clinic.appointment(starts_in=4 * MINUTE)
    for command, appointment_id, status in (
        ("process-appointment-sessions", over, "CANCELLED"),
        ("activate-booked-appointments", soon, "IN_PROGRESS"),
    ):
        told = answer(run(command, "--json"))
        (line,) = [each for each in logged(log, "legacy_trigger_run") if each["command_name"] == told["command_name"]]
        assert told["command_name"] == command.replace("-", "_")
        assert (told["processed"], told["skipped"], told["disabled"]) == (1, 0, False)
        assert line["job_run_id"] == told["job_run_id"]
        assert await clinic.fetchval("SELECT status FROM appointments WHERE id = $1", appointment_id) == status
        shown = run(command)
        assert shown.returncode == 0
        assert "processed" in shown.stdout


async def test_legacy_commands_that_are_disabled_do_nothing_and_say_so(clinic: Clinic, run: Run, log: Path) -> None:
    await clinic.appointment(starts_in=-40 * MINUTE)
    await clinic.appointment(starts_in=4 * MINUTE)
    off = {"DISABLE_LEGACY_APPOINTMENT_TRIGGERS": "true"}
    for command in ("process-appointment-sessions", "activate-booked-appointments"):
        assert answer(run(command, "--json", **off))["disabled"] is True
        assert run(command, **off).stdout == "Legacy appointment triggers disabled.\n"
    await clinic.fetch("INSERT INTO flag_overrides (flag, target) VALUES ($1, '{\"default\": true}')", *off)
    assert answer(run("process-appointment-sessions", "--json"))["disabled"] is True
    told = {line["message"] for line in logged(log, "legacy_triggers_disabled")}
    assert told == {"Legacy appointment triggers disabled"}
    assert logged(log, "legacy_trigger_run") == []
    assert {row["status"] for row in await clinic.fetch("SELECT status FROM appointments")} == {"CONFIRMED"}
