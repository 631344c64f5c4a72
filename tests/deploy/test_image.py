"""The image: what deploy/Dockerfile says, and that what it installs is whole. No image is built here."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from asyncio.subprocess import Process
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from services.cli.embedded import LOGIN, OWNER
from tests.deploy.files import API_PORT, DEPLOY, ROOT, WORKER_PORT, is_pinned, known_variables
from tests.processes import free_port, until
from tests.running import SECRET
from tests.servers import administration, running_servers

INSTRUCTIONS = [
    (match[1], match[2])
    for match in re.finditer(r"^([A-Z]+) (.*)$", re.sub(r"\\\n", "", (DEPLOY / "Dockerfile").read_text()), re.MULTILINE)
]
COPIED = [
    source
    for instruction, words in INSTRUCTIONS
    if instruction == "COPY" and "--from=" not in words
    for source in shlex.split(words)[:-1]
]


def test_what_is_copied_is_there_and_let_through() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line[0] == "!"} == set(COPIED)
    assert [source for source in COPIED if not (ROOT / source).exists()] == []


def test_each_stage_begins_with_a_version_that_the_program_is_tested_with() -> None:
    stages = [words.split()[0] for instruction, words in INSTRUCTIONS if instruction == "FROM"]
    assert len(stages) == 2
    for image in stages:
        assert is_pinned(image)
        assert image.startswith(f"python:{sys.version_info.major}.{sys.version_info.minor}.")


def test_it_runs_as_nobody_in_particular_and_without_a_shell() -> None:
    last = dict(INSTRUCTIONS)
    assert last["USER"] == "10001:10001"
    assert last["CMD"] == '["python", "-m", "services.api"]'
    assert [words for instruction, words in INSTRUCTIONS if instruction == "RUN" and words[0] != "["] == []
    assert "CMD [" in last["HEALTHCHECK"]


def environment_of_the_image() -> dict[str, str]:
    words = [shlex.split(words) for instruction, words in INSTRUCTIONS if instruction == "ENV"][-1]
    return {name: value for name, _, value in (word.partition("=") for word in words) if name != "PATH"}


def test_its_environment_is_made_of_settings() -> None:
    ours = {name for name in environment_of_the_image() if not name.startswith("PYTHON")}
    assert ours - known_variables() == set()
    assert len(ours) == 3


def test_its_ports_are_those_of_the_settings() -> None:
    last = dict(INSTRUCTIONS)
    assert last["EXPOSE"] == f"{API_PORT} {WORKER_PORT}"
    assert f"127.0.0.1:{API_PORT}/healthz" in last["HEALTHCHECK"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as the image installs it, made of what the image copies and of nothing else."""
    folder = tmp_path_factory.mktemp("image")
    for source in COPIED:
        target = folder / "context" / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    (install,) = [words for name, words in INSTRUCTIONS if name == "RUN" and "--no-build-isolation" in words]
    options = [word for word in json.loads(install) if word.startswith("--")]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", folder, "."]
    subprocess.run(command, cwd=folder / "context", check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


MIGRATE = "import services.cli.main as m; assert m.__file__.startswith({!r}), m.__file__; m.main()"


async def test_what_it_installs_migrates_a_new_database_and_serves(site: Path) -> None:
    async with running_servers(durable=False) as servers:
        # As in the image: no home, and nothing of the repository where it runs.
        environment = environment_of_the_image() | {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "PYTHONPATH": str(site),
            "SESSIONGATE_DATABASE_URL": servers.database_url(LOGIN),
            "SESSIONGATE_REDIS_URL": servers.redis_url,
            "SESSIONGATE_JWT_SECRET": SECRET,
            "SESSIONGATE_API_PORT": str(free_port()),
            "SESSIONGATE_WORKER_METRICS_PORT": str(free_port()),
        }

        async def run(*command: str | Path, **settings: str) -> Process:
            return await asyncio.create_subprocess_exec(*command, cwd="/", env=environment | settings)

        roles = await run(
            *(servers.postgres_bin / "psql", "--quiet", "--set=ON_ERROR_STOP=1", servers.database_url(OWNER)),
            *("--file", DEPLOY / "postgres/roles.sql"),
            APP_PASSWORD="it's a secret",
        )
        assert await roles.wait() == 0
        async with administration(servers) as connection:
            assert await connection.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = $1", LOGIN)
        migrate = (sys.executable, "-c", MIGRATE.format(str(site)), "migrate")
        assert await (await run(*migrate, SESSIONGATE_DATABASE_URL=servers.database_url(OWNER))).wait() == 0

        processes = [await run(sys.executable, "-m", f"services.{name}") for name in ("api", "worker")]
        try:
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{environment['SESSIONGATE_API_PORT']}") as client:

                async def ready() -> Any:
                    assert all(process.returncode is None for process in processes)
                    with suppress(httpx2.TransportError):
                        return (await client.get("/readyz")).json()["status"] == "ok"

                await until(ready)
        finally:
            for process in processes:
                process.terminate()
        assert [await process.wait() for process in processes] == [0, 0]
