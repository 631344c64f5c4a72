"""`sessiongate up`, with the real servers and services."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from services.cli.embedded import LOGIN, OWNER
from services.cli.home import Home
from tests.cli.conftest import STOP_SECONDS, StartUp, Up, is_alive, mode, open_folder, sessiongate


@pytest.fixture(scope="module")
def up(start_up: StartUp) -> Iterator[Up]:
    """One that runs for all tests that do not end it."""
    exported = {"ENFORCE_SESSION_GATED_CHAT": "true", "ALLOW_LEGACY_APPOINTMENT_CHAT": "true"}
    with open_folder() as folder:
        (folder / ".env").write_text("ENFORCE_SESSION_GATED_BILLING=false\nENFORCE_SESSION_GATED_CHAT=false\n")
        started = start_up(folder, env=exported)
        started.wait_for("Ctrl-C")
        yield started
        started.end(signal.SIGTERM)


def test_it_says_where_it_is_and_what_to_try(up: Up) -> None:
    assert f"ready http://127.0.0.1:{up.port}\n" in up.output
    token = up.output.split("TOKEN=")[1].split()[0]
    for line in up.output.splitlines():
        if line.strip().startswith("curl"):
            answer = subprocess.run(
                line.replace("curl", "curl --silent --fail"), shell=True, env=os.environ | {"TOKEN": token}, timeout=10
            )
            assert answer.returncode == 0, line
    assert up.output.count("curl") == 3


def test_the_services_log_to_files(up: Up) -> None:
    for name in ("api", "worker"):
        lines = (up.home / "logs" / f"{name}.jsonl").read_text().splitlines()
        assert lines
        assert all(json.loads(line) for line in lines)
    assert "{" not in up.output


def test_what_the_services_log_can_be_searched(up: Up) -> None:
    known = {"SESSIONGATE_HOME": str(up.home)}
    deadline = time.monotonic() + STOP_SECONDS
    services: set[str] = set()
    while services != {"sessiongate-api", "sessiongate-worker"} and time.monotonic() < deadline:
        found = sessiongate(up.home.parent, "logs", "search", "--limit", "1000", "--json", env=known)
        assert found.returncode == 0, found.stderr
        services = {line["service"] for line in json.loads(found.stdout)}
    assert services == {"sessiongate-api", "sessiongate-worker"}
    counted = json.loads(sessiongate(up.home.parent, "logs", "stats", "--since", "1h", "--json", env=known).stdout)
    assert "worker_started" in {each["event"] for each in counted}


async def test_up_json_tells_everything_and_only_to_the_user(up: Up) -> None:
    assert mode(up.home / "up.json") == 0o600
    found = up.whereabouts()
    assert found.keys() == {"api", "worker_metrics", "database_url", "redis_url", "pids", "logs", "flags", "users"}
    assert found["pids"].keys() == {"up", "api", "worker", "postgres", "redis"}
    assert found["pids"]["up"] == up.process.pid
    assert found["logs"] == {name: str(up.home / "logs" / f"{name}.jsonl") for name in ("api", "worker")}
    assert {"operator", "doctor", "patient"} == {user["role"] for user in found["users"]}
    connection = await asyncpg.connect(found["database_url"])
    assert await connection.fetchval("SELECT current_user") == OWNER
    services = await connection.fetch(
        "SELECT DISTINCT usename FROM pg_stat_activity"
        " WHERE application_name IN ('sessiongate-api', 'sessiongate-worker')"
    )
    await connection.close()
    assert [row["usename"] for row in services] == [LOGIN]


def test_it_enforces_unless_dotenv_or_the_environment_say_otherwise(up: Up) -> None:
    with closing(urllib.request.urlopen(f"http://127.0.0.1:{up.port}/metrics", timeout=5)) as answer:
        lines = answer.read().decode().splitlines()
    flags = {
        line.split('"')[1]: float(line.split()[-1]) for line in lines if line.startswith("feature_flag_enabled{flag=")
    }
    assert flags == {
        "ENFORCE_SESSION_GATED_CHAT": 1,  # exported; .env says otherwise
        "ENFORCE_SESSION_GATED_BILLING": 0,  # .env
        "DISABLE_LEGACY_APPOINTMENT_TRIGGERS": 1,  # of `up`
        "ALLOW_LEGACY_APPOINTMENT_CHAT": 1,  # exported
    }


def test_flags_are_listed_beside_the_environment_of_the_services(up: Up, folder: Path) -> None:
    listed = json.loads(sessiongate(folder, "flags", "list", "--json", env={"SESSIONGATE_HOME": str(up.home)}).stdout)
    environment = {row["flag"]: row["environment"] for row in listed["flags"]}
    assert (
        environment
        == up.whereabouts()["flags"]
        == {
            "ENFORCE_SESSION_GATED_CHAT": True,
            "ENFORCE_SESSION_GATED_BILLING": False,
            "DISABLE_LEGACY_APPOINTMENT_TRIGGERS": True,
            "ALLOW_LEGACY_APPOINTMENT_CHAT": True,
        }
    )


def test_a_second_one_says_where_the_first_is(up: Up, folder: Path) -> None:
    second = sessiongate(folder, "up", "--home", str(up.home))
    assert second.returncode == 1
    assert second.stderr == f"Sessiongate is already running at http://127.0.0.1:{up.port} (home {up.home}).\n"
    assert up.process.poll() is None


@pytest.mark.parametrize("name", ["api", "worker"])
def test_a_service_that_dies_is_started_again(up: Up, name: str) -> None:
    killed = up.whereabouts()["pids"][name]
    os.kill(killed, signal.SIGKILL)
    up.wait_for(f"The {'API' if name == 'api' else name} has ended (killed by SIGKILL); starting it again")
    deadline = time.monotonic() + 10
    while (pid := up.whereabouts()["pids"][name]) == killed:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert f"services.{name}" in psutil.Process(pid).cmdline()


async def test_data_outlives_every_end_and_processes_do_not(start_up: StartUp, folder: Path) -> None:
    first = start_up(folder)
    first.wait_for("Ctrl-C")
    children, people = first.children(), first.whereabouts()["users"]
    assert len(children) == 4
    started = time.monotonic()
    assert first.end(signal.SIGINT) == 0
    assert time.monotonic() - started < STOP_SECONDS
    assert not any(is_alive(child) for child in children)
    assert not (first.home / "up.json").exists()
    assert not (first.home / "run").exists()

    second = start_up(folder)
    second.wait_for("Ctrl-C")
    assert [user["name"] for user in second.whereabouts()["users"]] == [user["name"] for user in people]
    children = second.children()
    second.end(signal.SIGKILL)

    third = start_up(folder)
    third.wait_for("Ctrl-C")
    assert not any(is_alive(child) for child in children)
    connection = await asyncpg.connect(third.whereabouts()["database_url"])
    assert await connection.fetchval("SELECT count(*) FROM tenants") == 1
    await connection.close()
    os.kill(third.whereabouts()["pids"]["redis"], signal.SIGKILL)
    third.wait_for("Redis has gone (killed by SIGKILL)")
    assert third.end(signal.SIGTERM) == 0


async def test_given_servers_are_used_instead_of_embedded_ones_and_what_is_overridden_there_is_said(
    start_up: StartUp, folder: Path, urls: Any, owner: Any
) -> None:
    for flag, on in (("ENFORCE_SESSION_GATED_CHAT", False), ("ENFORCE_SESSION_GATED_BILLING", True)):
        target = json.dumps({"default": on})
        await owner.execute("INSERT INTO flag_overrides (flag, target) VALUES ($1, $2)", flag, target)
    env = {"SESSIONGATE_DATABASE_URL": urls.app, "SESSIONGATE_REDIS_URL": urls.redis}
    started = start_up(folder, env=env | {"SESSIONGATE_MIGRATIONS_DATABASE_URL": urls.owner})
    started.wait_for("Ctrl-C")
    found = started.whereabouts()
    assert (found["pids"]["postgres"], found["pids"]["redis"]) == (None, None)
    assert (found["database_url"], found["redis_url"]) == (urls.owner, urls.redis)
    assert not (started.home / "postgres").exists()
    said = [line for line in started.output.splitlines() if line.startswith("An override")]
    assert said == [
        "An override has ENFORCE_SESSION_GATED_CHAT off, whatever the environment says; see `sessiongate flags list`."
    ]
    assert started.end(signal.SIGTERM) == 0


def test_a_used_port_is_found_before_anything_starts(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = sessiongate(folder, "up", "--home", "home", "--port", str(port))
    assert refused.returncode == 1
    assert refused.stderr == (
        f"Port {port} of 127.0.0.1 cannot be used (Address already in use); choose another with --port.\n"
    )
    assert not (folder / "home" / "postgres").exists()


def test_data_of_another_postgresql_is_refused_and_not_touched(start_up: StartUp, folder: Path) -> None:
    data = folder / "home" / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("99\n")
    refused = start_up(folder)
    assert refused.process.wait(10) == 1
    refused._reader.join(5)
    assert f"The data in {data} was written by PostgreSQL 99" in refused.output
    assert [path.name for path in data.iterdir()] == ["PG_VERSION"]


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ENFORCE_SESSION_GATED_CHAT", "perhaps", "ENFORCE_SESSION_GATED_CHAT must be true or false.\n"),
        ("SESSIONGATE_JWT_SECRET", "swordfish", "SESSIONGATE_JWT_SECRET must be at least 32 bytes long.\n"),
        ("SESSIONGATE_METRICS_ALLOW", "300.0.0.0/8", "SESSIONGATE_METRICS_ALLOW must be networks such as 10.0.0.0/8"),
        ("SESSIONGATE_DATABASE_URL", "mysql://swordfish", "SESSIONGATE_DATABASE_URL must be an address such as"),
    ],
)
def test_a_wrong_setting_is_named_and_not_repeated(folder: Path, variable: str, value: str, sentence: str) -> None:
    refused = sessiongate(folder, "up", "--home", "home", env={variable: value})
    assert refused.returncode == 2
    assert refused.stderr.startswith(sentence)
    assert refused.stdout == ""
    assert value not in refused.stderr
    assert not (folder / "home" / "postgres").exists()


def test_leftovers_are_told_from_strangers_with_their_number(folder: Path) -> None:
    home = Home(folder)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with home.lock() as lock:
            lock.add(child.pid)
        with home.lock() as lock:
            assert [process.pid for process in lock.leftovers()] == [child.pid]
        reused = f"{child.pid} {psutil.Process(child.pid).create_time() - 60}\n"
        (folder / "up.lock").write_text(reused)
        with home.lock() as lock:
            assert lock.leftovers() == []
        child.kill()
