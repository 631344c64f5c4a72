"""The `sessiongate` command as a process of its own, as people run it."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import free_port

SESSIONGATE = str(Path(sys.executable).with_name("sessiongate"))
START_SECONDS = 30.0
STOP_SECONDS = 20.0

# What the person who runs the tests has exported is not part of them.
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SESSIONGATE_", "OTEL_", "ENFORCE_", "DISABLE_LEGACY_", "ALLOW_LEGACY_"))
}


class Up:
    """`sessiongate up` in the working directory `folder`, at two free ports, with its home in `folder/home`."""

    def __init__(self, folder: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.home = folder / "home"
        self.port = free_port()
        command = [SESSIONGATE, "up", "--home", str(self.home), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--worker-port", str(free_port()), *options],
            cwd=folder,
            env=CLEAN | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.output += line

    def wait_for(self, text: str) -> None:
        """Waits until it has said `text`."""
        deadline = time.monotonic() + START_SECONDS
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def whereabouts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "up.json").read_text())
        return found

    def children(self) -> list[psutil.Process]:
        pids = self.whereabouts()["pids"]
        return [psutil.Process(pid) for name, pid in pids.items() if pid and name != "up"]

    def end(self, signum: signal.Signals) -> int:
        """Sends the signal and returns the exit status."""
        self.process.send_signal(signum)
        status = self.process.wait(STOP_SECONDS)
        self._reader.join(STOP_SECONDS)
        return status


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the unprivileged user of root's servers can reach, unlike pytest's own."""
    with open_folder() as made:
        yield made


@contextmanager
def open_folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="sessiongate-tests-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


StartUp = Callable[..., Up]


@pytest.fixture(scope="module")
def start_up() -> Iterator[StartUp]:
    """Starts `sessiongate up`; whatever still runs at the end is stopped."""
    started: list[Up] = []

    def start(folder: Path, *options: str, env: dict[str, str] | None = None) -> Up:
        started.append(Up(folder, *options, env=env))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.end(signal.SIGTERM)


def sessiongate(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [SESSIONGATE, *arguments], cwd=folder, env=CLEAN | (env or {}), capture_output=True, text=True, timeout=60
    )


def is_alive(process: psutil.Process) -> bool:
    """Zombies are not: nobody may be there to bury the orphans of a killed parent."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
