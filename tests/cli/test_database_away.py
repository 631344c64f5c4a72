"""What the commands say when the database cannot do what they ask: one sentence, what to do, and status 1."""

import json
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.api.calls import Owner
from tests.cli.conftest import sessiongate
from tests.clinic import Clinic
from tests.conftest import Urls
from tests.processes import free_port
from tests.running import SECRET

COMMANDS = (
    ("appointments", "monitor-sessions"),
    ("appointments", "auto-start-sessions"),
    ("appointments", "recover-sessions"),
    ("flags", "report"),
    ("explain", "12"),
    ("token", "--user", "1"),
    ("tenants", "create", "Riverside"),
    ("flags", "list"),
)


def refusal(folder: Path, command: tuple[str, ...], database_url: str) -> str:
    """The one sentence."""
    env = {
        "SESSIONGATE_HOME": str(folder / "home"),
        "SESSIONGATE_DATABASE_URL": database_url,
        "SESSIONGATE_REDIS_URL": "redis://127.0.0.1:1",
        "SESSIONGATE_JWT_SECRET": SECRET,
    }
    refused = sessiongate(folder, *command, env=env)
    assert (refused.returncode, refused.stdout) == (1, ""), refused.stderr
    assert refused.stderr.count("\n") == 1, refused.stderr
    return refused.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_nobody_listens(tmp_path: Path, command: tuple[str, ...]) -> None:
    said = refusal(tmp_path, command, f"postgresql://sessiongate@127.0.0.1:{free_port()}/sessiongate")
    assert said.startswith("The database cannot be reached: ")
    assert said.endswith("Start Sessiongate with `sessiongate up`, or check SESSIONGATE_DATABASE_URL.\n")


def test_a_socket_that_is_gone_is_told_likewise(tmp_path: Path) -> None:
    said = refusal(tmp_path, COMMANDS[0], f"postgresql://sessiongate@/sessiongate?host={tmp_path}/gone")
    assert said.startswith("The database cannot be reached: ")


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        said = refusal(tmp_path, COMMANDS[0], f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/sessiongate")
    assert said.startswith("The database cannot be reached: it does not answer in time. ")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_schema_that_was_never_made_is_told_with_its_remedy(
    tmp_path: Path, urls: Urls, command: tuple[str, ...]
) -> None:
    elsewhere = urls.owner.replace(urlsplit(urls.owner).path, "/postgres")
    assert refusal(tmp_path, command, elsewhere).endswith("`sessiongate migrate`.\n")


def test_who_is_not_let_in_is_told_to_check_the_address(tmp_path: Path, urls: Urls) -> None:
    for wrong in (
        urls.app.replace("sessiongate_app", "nobody_we_know"),
        urls.app.replace(urlsplit(urls.app).path, "/nowhere"),
    ):
        said = refusal(tmp_path, COMMANDS[0], wrong)
        assert said.startswith("The database does not let us in: ")
        assert said.endswith("Check SESSIONGATE_DATABASE_URL.\n")


async def test_a_lock_that_is_not_released_is_told(tmp_path: Path, clinic: Clinic, owner: Owner, urls: Urls) -> None:
    database = await owner.fetchval("SELECT current_database()")
    await owner.execute(f"ALTER ROLE sessiongate_app IN DATABASE {database} SET lock_timeout = '100ms'")
    async with owner.transaction():
        await owner.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        said = refusal(tmp_path, ("token", "--user", "1"), urls.app)
    await owner.execute(f"ALTER ROLE sessiongate_app IN DATABASE {database} RESET lock_timeout")
    assert said.startswith("The database is busy or stopping: ")
    assert said.endswith("Try again in a moment.\n")


def test_what_a_killed_up_has_left_behind_does_not_run(tmp_path: Path) -> None:
    gone = {"database_url": "postgresql://me@/x?host=/gone", "redis_url": "unix:///gone", "pids": {"up": 1}}
    (tmp_path / "up.json").write_text(json.dumps(gone))
    (tmp_path / "up.lock").touch()
    for command in (*COMMANDS, ("demo",)):
        refused = sessiongate(tmp_path, *command, env={"SESSIONGATE_HOME": str(tmp_path)})
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"Sessiongate is not running (home {tmp_path}). ")
