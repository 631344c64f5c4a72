"""The worker's composition root: the pulse, the cron, the outbox lanes, the gauges, and the doorbell's listener."""

import asyncio
import signal
import sys
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import uvloop

from libs.domain.conversion.report import Reporter
from libs.domain.conversion.runs import Converter
from libs.domain.db import WORKER_TIMEOUTS, Database
from libs.domain.doorbell import Doorbell
from libs.domain.jobs import ConvertDue, DispatchOutbox, Job
from libs.domain.legacy.commands import Command
from libs.domain.legacy.triggers import Triggers
from libs.domain.logs.sink import searchable
from libs.domain.notifications import Notifications
from libs.domain.outbox.dispatch import Dispatcher, EventConsumer
from libs.domain.outbox.events import Consumer, Lane
from libs.domain.runtime import compose, flags_of, telemetry
from libs.domain.settings import FlagSettings, libpq_dsn, load
from libs.domain.telemetry import logger
from libs.domain.webhooks.sending import Webhooks
from libs.observability.exposition import MetricsAccess, serve_metrics
from libs.observability.loop import watch_loop
from services.worker.audit import Auditor
from services.worker.cron import Cron
from services.worker.gauges import Gauges
from services.worker.outbox import OutboxLane, WebhookLane
from services.worker.pulse import Pulse
from services.worker.runner import functions, listen
from services.worker.settings import WorkerSettings

_log: Final = logger("worker")

GRACE_SECONDS: Final = 15.0
CANCEL_AGAIN_SECONDS: Final = 0.5


class LocalBell:
    """Rings for jobs within this process: whoever commits rows here needs no Redis to have them followed up.
    Who watches a conversation is in another process."""

    def __init__(self, doorbell: Doorbell) -> None:
        self.handlers: dict[type[Job], Callable[[], None]] = {}
        self.changed = doorbell.changed
        self.typing = doorbell.typing

    def ring(self, job: Job) -> None:
        self.handlers[type(job)]()


async def work(settings: WorkerSettings, flags: FlagSettings) -> None:
    """Works until SIGTERM or SIGINT."""
    async with telemetry(settings, "sessiongate-worker") as (metrics, logging):
        secret = settings.metrics_basic_auth
        access = MetricsAccess.parse(secret.get_secret_value() if secret else None, settings.metrics_allow)
        database = Database(
            libpq_dsn(settings.database_url),
            application="sessiongate-worker",
            pool_size=settings.pool_size,
            command_timeout=35.0,
            timeouts=WORKER_TIMEOUTS,
        ).observed(metrics, "worker")
        doorbell = Doorbell(settings.redis_url, metrics)
        bell = LocalBell(doorbell)
        runtime = compose(settings, flags_of(flags), metrics=metrics, database=database, bell=bell)
        reporter = Reporter(metrics)
        converter = Converter(
            database,
            reporter.batch,
            worker=settings.worker_name,
            counts=True,
            batch_limit=settings.conversion_batch_limit,
        )
        pulse = Pulse(runtime, converter, reporter)
        triggers = Triggers(database, bell, runtime.flags, metrics, converter)
        cron = Cron(
            database,
            {
                Command.PROCESS_APPOINTMENT_SESSIONS: triggers.process_appointment_sessions,
                Command.ACTIVATE_BOOKED_APPOINTMENTS: triggers.activate_booked_appointments,
            },
        )
        webhooks = Webhooks(runtime)
        consumers: dict[Consumer, EventConsumer] = {
            Consumer.NOTIFICATIONS: Notifications(database),
            Consumer.WEBHOOK: webhooks,
        }
        dispatcher = Dispatcher(database, consumers, metrics)
        lanes: list[OutboxLane | WebhookLane] = [OutboxLane(dispatcher, lane) for lane in (Lane.URGENT, Lane.NORMAL)]
        lanes.append(WebhookLane(dispatcher))
        gauges = Gauges(runtime, doorbell, settings.worker_name, lambda: pulse.is_well)
        auditor = Auditor(
            database,
            metrics,
            interval=settings.audit_interval_seconds,
            patience=settings.audit_timeout_seconds,
        )

        def dispatch() -> None:
            for lane in lanes:
                lane.wake()

        bell.handlers = {ConvertDue: pulse.wake, DispatchOutbox: dispatch}
        jobs = functions(bell.handlers, metrics)
        try:
            async with (
                searchable(logging, settings, database, metrics),
                serve_metrics(metrics, access, settings.worker_metrics_host, settings.worker_metrics_port) as port,
                watch_loop(metrics),
                runtime.flags.following(),
                runtime.recorder.writing(),
            ):
                _log.info("worker_started", worker=settings.worker_name, metrics_port=port)
                abandoned = [gauges.run(), listen(settings.redis_url, jobs), _watch(pulse)]
                if settings.audit_interval_seconds:
                    abandoned.append(auditor.run())
                await run_until_signalled(finishing=[pulse, cron, *lanes], abandoned=abandoned)
                with suppress(Exception):
                    await gauges.leave()
                _log.info("worker_stopped", worker=settings.worker_name)
        finally:
            await webhooks.close()
            await doorbell.close()
            await database.close()


async def _watch(pulse: Pulse) -> None:
    """Ends with a fault once the pulse is stuck, so that the process is replaced."""
    while not pulse.is_stuck:  # noqa: ASYNC110 no event tells that nothing happens
        await asyncio.sleep(1.0)
    raise RuntimeError("The pulse is stuck.")


class Finishing(Protocol):
    """A loop that, when stopped, finishes what it has begun."""

    async def run(self) -> None: ...

    def stop(self) -> None: ...


async def run_until_signalled(finishing: Sequence[Finishing], abandoned: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs all loops until SIGTERM or SIGINT. Then the first kind may finish what it has begun, within
    the grace period; the second kind is cancelled. A loop that ends by itself is a fault and raised."""
    signalled = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, signalled.set)
    finishers = [asyncio.create_task(each.run()) for each in finishing]
    others = [asyncio.create_task(each) for each in abandoned]
    waiting = asyncio.create_task(signalled.wait())
    tasks = [*finishers, *others]
    try:
        done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {waiting}:
            task.result()
            raise RuntimeError("A loop of the worker ended by itself.")
        for each in finishing:
            each.stop()
        for task in others:
            task.cancel()
        await asyncio.wait(finishers, timeout=GRACE_SECONDS)
    finally:
        await _end([waiting, *tasks])


async def _end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels until all have ended: a client that is just connecting may lose a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    settings, flags = load(WorkerSettings), load(FlagSettings)
    try:
        uvloop.run(work(settings, flags))
    except (ValueError, OSError) as error:
        sys.exit(f"The worker cannot start: {error}")
