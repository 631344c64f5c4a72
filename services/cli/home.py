"""HOME: the folder in which a running Sessiongate keeps its data, its secret and its whereabouts.

HOME/up.json     what runs and where, while it runs (mode 0600)
HOME/up.lock     held by the one `up` of this folder; lists the processes it started
HOME/secret      the key that signs bearer tokens
HOME/logs        api.jsonl, worker.jsonl, postgres.log, redis.log
HOME/postgres    data, or a link to it
HOME/redis       likewise
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypedDict, TypeVar

import psutil
from dotenv import dotenv_values
from pydantic_settings import BaseSettings

from libs.domain.settings import DatabaseSettings, FlagSettings, Settings, load, sources, variable
from services.cli.errors import CommandError

CLOCK_SLACK_SECONDS: Final = 2.0
"""The start time of a process is derived from the clock, which may be set."""


class Person(TypedDict):
    id: int
    role: str
    name: str
    token: str


class Pids(TypedDict):
    """Process ids; null for a server that is not ours."""

    up: int
    api: int
    worker: int
    postgres: int | None
    redis: int | None


class Logs(TypedDict):
    api: str
    worker: str


class Whereabouts(TypedDict):
    """The content of up.json. `database_url` is of the libpq form and names the owner of the schema; `flags` are
    the rollout flags that the services were given by their environment."""

    api: str
    worker_metrics: str
    database_url: str
    redis_url: str
    pids: Pids
    logs: Logs
    flags: dict[str, bool]
    users: list[Person]


class HomeSettings(BaseSettings):
    """Where `sessiongate up` keeps things, and the other commands look for them."""

    model_config = sources("SESSIONGATE_")

    home: Path = Path("~/.local/share/sessiongate")
    """The folder of data, logs and up.json."""


@dataclass(frozen=True, slots=True)
class Home:
    """One HOME folder. Nothing is created before it is needed."""

    path: Path

    @classmethod
    def locate(cls, option: Path | None = None) -> "Home":
        """The folder of the option `--home`, or else that of the settings."""
        return cls((option or load(HomeSettings).home).expanduser().absolute())

    def log(self, name: str) -> Path:
        return self.path / "logs" / name

    def create(self) -> None:
        """Makes the folder. Raises `CommandError` where that is impossible."""
        # Others may pass through, because the database servers may have to run as another user; they can
        # read nothing here.
        try:
            self.path.mkdir(mode=0o711, parents=True, exist_ok=True)
            self.log("").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise CommandError(f"The home {self.path} cannot be used: {error.strerror}.") from None

    def secret(self) -> str:
        """The key that signs bearer tokens, made at first use."""
        path = self.path / "secret"
        if not path.exists():
            _write_private(path, secrets.token_urlsafe(48))
        return path.read_text()

    def read(self) -> Whereabouts | None:
        """What runs here, or None. An `up` that was killed leaves its file behind, but not its lock."""
        try:
            whereabouts: Whereabouts = json.loads((self.path / "up.json").read_text())
            with (self.path / "up.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return whereabouts
        return None

    def write(self, whereabouts: Whereabouts) -> None:
        _write_private(self.path / "up.json", json.dumps(whereabouts, indent=2) + "\n")

    def forget(self) -> None:
        """Nothing runs here any more."""
        (self.path / "up.json").unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator["Lock"]:
        """Held by the one `up` of this folder. Raises `CommandError` when another one holds it."""
        with open(os.open(self.path / "up.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                running = self.read()
                where = f"at {running['api']}" if running else "and still starting or stopping"
                raise CommandError(f"Sessiongate is already running {where} (home {self.path}).") from None
            yield Lock(file)


class Lock:
    """The list of processes that the holder started, so that the next one can clear away what a kill left."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def add(self, pid: int) -> None:
        with suppress(psutil.NoSuchProcess):
            self._file.write(f"{pid} {psutil.Process(pid).create_time()}\n")
            self._file.flush()

    def leftovers(self) -> list[psutil.Process]:
        """Processes of an earlier holder that are still alive. A process id alone may have been reused."""
        found = []
        self._file.seek(0)
        for line in self._file:
            pid, created = line.split()
            try:
                process = psutil.Process(int(pid))
                same = abs(process.create_time() - float(created)) < CLOCK_SLACK_SECONDS
                if same and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()


def environment() -> dict[str, str]:
    """The variables of the `.env` file in the working directory and of the environment, which wins."""
    dotenv = {name: value for name, value in dotenv_values(".env").items() if value}
    return dotenv | {name: value for name, value in os.environ.items() if value}


S = TypeVar("S", bound=DatabaseSettings)


def settings(kind: type[S]) -> S:
    """The settings of a command. What is not set, of addresses and the token key, is that of the running `up`.

    Raises `CommandError` when there is no database either way.
    """
    given = environment()
    home = Home.locate()
    running = home.read()
    if running is None and "SESSIONGATE_DATABASE_URL" not in given:
        raise CommandError(
            f"Sessiongate is not running (home {home.path}). Start it with `sessiongate up`,"
            " or set SESSIONGATE_DATABASE_URL and SESSIONGATE_REDIS_URL."
        )
    found: dict[str, str] = {}
    if running:
        found = {"database_url": running["database_url"], "redis_url": running["redis_url"]}
        if "SESSIONGATE_JWT_JWKS" not in given:
            found["jwt_secret"] = home.secret()
    return load(kind, **{name: value for name, value in found.items() if variable(kind, name) not in given})


def logging_settings() -> Settings:
    """Those of a command that logs what it does: to a file, as the services do, since stdout is for the answer."""
    found = settings(Settings)
    return found if found.log_file else found.model_copy(update={"log_file": Home.locate().log("cli.jsonl")})


def flag_settings() -> FlagSettings:
    """The rollout flags in the environment of the services: of the running `up`, or else that of this process."""
    running = Home.locate().read()
    return load(FlagSettings, **(running["flags"] if running else {}))


def _write_private(path: Path, text: str) -> None:
    """Writes a file that only the user can read, all of it or nothing."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
