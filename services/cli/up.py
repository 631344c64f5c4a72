"""`sessiongate up`: everything on one machine, for as long as this process lives."""

import asyncio
import os
import signal
import socket
import time
from asyncio.subprocess import Process
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import psutil
import typer

from libs.domain.settings import FlagSettings, libpq_dsn, load
from services.api.settings import ApiSettings
from services.cli import embedded, processes
from services.cli.embedded import LOGIN, OWNER, Servers
from services.cli.errors import CommandError
from services.cli.home import Home, Lock, Person, environment
from services.cli.migrate import upgrade
from services.cli.service import Service, say
from services.worker.settings import WorkerSettings

LEFTOVERS_SECONDS: Final = 10.0

_ANYWHERE: Final[Mapping[str, str]] = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 not bound to, but seen through

# A new clinic has no clients of the legacy ways, so it starts with the last phase of their rollout.
DEFAULTS: Final[Mapping[str, str]] = {
    "ENFORCE_SESSION_GATED_CHAT": "true",
    "ENFORCE_SESSION_GATED_BILLING": "true",
    "DISABLE_LEGACY_APPOINTMENT_TRIGGERS": "true",
    "ALLOW_LEGACY_APPOINTMENT_CHAT": "false",
    "SESSIONGATE_METRICS_ALLOW": "127.0.0.0/8,::1/128",
    "SESSIONGATE_LOG_SEARCH_HOURS": "72",
}
"""What the services are told unless the environment or `.env` says otherwise."""


def up(
    home: Annotated[Path | None, typer.Option(help="Where data, logs and up.json are kept.")] = None,
    port: Annotated[int | None, typer.Option(help="The port of the API.  [default: 8000]")] = None,
    worker_port: Annotated[int | None, typer.Option(help="The port of the worker's metrics.  [default: 9101]")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set the present data aside and begin anew.")] = False,
) -> None:
    """Run everything on this machine until Ctrl-C: PostgreSQL, Redis, the API and the worker.

    Where SESSIONGATE_DATABASE_URL (with SESSIONGATE_MIGRATIONS_DATABASE_URL) or SESSIONGATE_REDIS_URL is set,
    that server is used instead of one of its own.
    """
    place = Home.locate(home)
    place.create()
    with place.lock() as lock:
        _stop_leftovers(lock)
        place.forget()
        try:
            asyncio.run(_until_signalled(place, lock, port, worker_port, fresh))
        finally:
            place.forget()
            lock.clear()


async def _until_signalled(home: Home, lock: Lock, port: int | None, worker_port: int | None, fresh: bool) -> None:
    run = asyncio.create_task(_run(home, lock, port, worker_port, fresh))

    def stop() -> None:
        if not run.cancelling():  # once is enough; a second signal must not interrupt the stopping
            say("Stopping …")
            run.cancel()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signum, stop)
    with suppress(asyncio.CancelledError):
        await run
    if run.cancelling():  # rather than ended by a wrong setting, which cancels all that waits
        say("Stopped; the data is kept.")


async def _run(home: Home, lock: Lock, port: int | None, worker_port: int | None, fresh: bool) -> None:
    """Starts everything, says where it is, and stays until cancelled; then all stops in reverse order."""
    given = environment()
    own_database, own_redis = "SESSIONGATE_DATABASE_URL" not in given, "SESSIONGATE_REDIS_URL" not in given
    if fresh and not own_database:
        raise CommandError("--fresh sets embedded data aside; unset SESSIONGATE_DATABASE_URL to use it.")
    async with AsyncExitStack() as stack:
        servers = stack.enter_context(embedded.prepare(home, lock))
        _set_environment(given, home, servers, port, worker_port)
        settings, worker_settings, flags = load(ApiSettings), load(WorkerSettings), load(FlagSettings)
        _check_ports(settings, worker_settings)
        owner_url = libpq_dsn(settings.migrations_database_url or settings.database_url)
        # The services need not know who may change the schema.
        os.environ.pop("SESSIONGATE_MIGRATIONS_DATABASE_URL", None)

        postgres = redis = None
        say("Starting …")
        if own_database:
            if fresh:
                _set_aside(home)
            servers.check_data()
            postgres = await stack.enter_async_context(servers.postgres())
        if own_redis:
            redis = await stack.enter_async_context(servers.redis())
        await asyncio.to_thread(upgrade, owner_url)

        url = _url(settings.api_host, settings.api_port)
        worker_url = _url(worker_settings.worker_metrics_host, worker_settings.worker_metrics_port) + "/metrics"
        running = Running(
            home,
            url=url,
            owner_url=owner_url,
            redis_url=settings.redis_url,
            api=Service("API", "services.api", f"{url}/readyz", home.log("api.jsonl"), lock),
            worker=Service("worker", "services.worker", worker_url, home.log("worker.jsonl"), lock),
            flags=flags,
            postgres=postgres,
            redis=redis,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(running.api.run(running.publish))
                tasks.create_task(running.worker.run(running.publish))
                if postgres:
                    tasks.create_task(_watch("PostgreSQL", postgres))
                if redis:
                    tasks.create_task(_watch("Redis", redis))
                seeding = tasks.create_task(_seed(owner_url, settings))
                await running.api.ready()
                await running.worker.ready()
                running.users = await seeding
                running.publish()
                await _tell_shadows(settings, flags)
                _invite(url, running.users)
        except* CommandError as group:
            raise group.exceptions[0] from None


@dataclass
class Running:
    """What `up` runs."""

    home: Home
    url: str
    owner_url: str
    redis_url: str
    api: Service
    worker: Service
    flags: FlagSettings
    postgres: Process | None
    redis: Process | None
    users: list[Person] = field(default_factory=list)

    def publish(self) -> None:
        """Writes up.json."""
        self.home.write(
            {
                "api": self.url,
                "worker_metrics": self.worker.url,
                "database_url": self.owner_url,
                "redis_url": self.redis_url,
                "pids": {
                    "up": os.getpid(),
                    "api": self.api.pid,
                    "worker": self.worker.pid,
                    "postgres": self.postgres.pid if self.postgres else None,
                    "redis": self.redis.pid if self.redis else None,
                },
                "logs": {"api": str(self.api.log), "worker": str(self.worker.log)},
                "flags": self.flags.model_dump(),
                "users": self.users,
            }
        )


def _set_environment(
    given: Mapping[str, str], home: Home, servers: Servers, port: int | None, worker_port: int | None
) -> None:
    """Completes the environment of this process, which is that of the services."""
    defaults = dict(DEFAULTS)
    if "SESSIONGATE_JWT_JWKS" not in given:
        defaults["SESSIONGATE_JWT_SECRET"] = home.secret()
    if "SESSIONGATE_DATABASE_URL" not in given:
        os.environ["SESSIONGATE_DATABASE_URL"] = servers.database_url(LOGIN)
        os.environ["SESSIONGATE_MIGRATIONS_DATABASE_URL"] = servers.database_url(OWNER)
    defaults["SESSIONGATE_REDIS_URL"] = servers.redis_url
    os.environ.update({name: value for name, value in defaults.items() if name not in given})
    if port is not None:
        os.environ["SESSIONGATE_API_PORT"] = str(port)
    if worker_port is not None:
        os.environ["SESSIONGATE_WORKER_METRICS_PORT"] = str(worker_port)


def _check_ports(api: ApiSettings, worker: WorkerSettings) -> None:
    if api.api_port == worker.worker_metrics_port:
        raise CommandError("The API and the worker need different ports; see --port and --worker-port.")
    for host, port, option in (
        (api.api_host, api.api_port, "--port"),
        (worker.worker_metrics_host, worker.worker_metrics_port, "--worker-port"),
    ):
        try:
            family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise CommandError(
                f"Port {port} of {host} cannot be used ({error.strerror}); choose another with {option}."
            ) from None


def _set_aside(home: Home) -> None:
    folders = (home.path / "postgres", home.path / "redis")
    present = [folder for folder in folders if os.path.lexists(folder)]
    if not present:
        return
    aside = home.path / f"old-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    aside.mkdir(mode=0o711)
    for folder in present:
        folder.rename(aside / folder.name)
    say(f"The old data is in {aside}.")


async def _seed(owner_url: str, settings: ApiSettings) -> list[Person]:
    """Makes the clinic of a new installation, and lists its people with tokens if those are ours to issue."""
    # Here: these imports take longer than everything before, and meanwhile the services start.
    from services.cli import seed

    await seed.seed(owner_url)
    if settings.jwt_secret is None:
        return []
    return await seed.people(owner_url, settings.jwt_secret.get_secret_value(), settings.jwt_issuer)


async def _tell_shadows(settings: ApiSettings, flags: FlagSettings) -> None:
    """Says which overrides of an earlier day win over what the services were given."""
    # Here, for the same reason as in `_seed`.
    from services.cli.flags import describe, rollout_of

    for override in (await rollout_of(settings, flags)).shadowing():
        whose = "" if override.tenant_id is None else f" for tenant {override.tenant_id}"
        say(
            f"An override{whose} has {override.flag} {describe(override.target)}, whatever the environment says;"
            " see `sessiongate flags list`."
        )


async def _watch(name: str, process: Process) -> None:
    await process.wait()
    say(f"{name} has gone ({processes.ending(process)}). The data is kept; press Ctrl-C and start again.")


def _stop_leftovers(lock: Lock) -> None:
    """Stops what an `up` that was killed has left running."""
    asked = False
    deadline = time.monotonic() + LEFTOVERS_SECONDS
    while left := lock.leftovers():
        for process in left:
            with suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline:
                    processes.kill(process)
                elif not asked:
                    process.send_signal(signal.SIGINT)
        asked = True
        time.sleep(0.05)
    if asked:
        say("Stopped what an earlier run had left behind.")


def _url(host: str, port: int) -> str:
    """Where a client of this machine finds a server that listens there."""
    host = _ANYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _invite(url: str, users: list[Person]) -> None:
    say(f"ready {url}")
    patient = next((user for user in users if user["role"] == "patient"), None)
    if patient:
        say(f"\nTry it as {patient['name']}, a patient:\n\n    TOKEN={patient['token']}\n")
        say(f'    curl -H "Authorization: Bearer $TOKEN" {url}/api/v1/doctors')
        say(f'    curl -H "Authorization: Bearer $TOKEN" {url}/api/v1/me')
    say(f"    curl {url}/metrics\n\nCtrl-C stops everything and keeps the data.")
