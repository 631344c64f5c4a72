"""What a process is made of, opened once at its start and handed to everything that needs it."""

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Final, NamedTuple

from libs.domain.billing.legacy import LegacyBilling
from libs.domain.catalogue import CATALOGUE
from libs.domain.channels import Channel
from libs.domain.chat.bodies import Bodies
from libs.domain.chat.sending import Chat
from libs.domain.conversion.monitor import Thresholds
from libs.domain.db import Database
from libs.domain.decisions.recorder import Recorder
from libs.domain.flags.live import LiveFlags
from libs.domain.log_events import LOG_EVENTS
from libs.domain.sealing import FieldKeys
from libs.domain.sessions.activity import Activity
from libs.domain.sessions.calls import Calls
from libs.domain.sessions.door import Door
from libs.domain.sessions.settlement import Settlement
from libs.domain.settings import FlagSettings, Settings
from libs.domain.telemetry import GuardTelemetry
from libs.domain.transaction import Bell, Transaction, transaction
from libs.guardrails import Flag, Flags, Guard, Refused
from libs.observability.logging import Logging, LogSettings, configure_logging
from libs.observability.registry import Metrics
from libs.observability.sampling import KeepBus
from libs.observability.tracing import configure_tracing

VERSION: Final = version("sessiongate")

KEPT_TRACES: Final = "sessiongate:kept_traces"
"""The channel on which processes tell each other which traces contain an error."""

SWITCH_SECONDS: Final = 0.0002
"""How long the threads that write logs may keep the event loop from reading an answer of the database; at
Python's own 5 ms, a busy writer costs conversion an eighth of its speed."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts of one process. Whoever has it needs no globals."""

    settings: Settings
    metrics: Metrics
    database: Database
    bell: Bell
    recorder: Recorder
    activity: Activity
    flags: LiveFlags
    guard: Guard
    settlement: Settlement
    door: Door
    field_keys: FieldKeys
    bodies: Bodies
    calls: Calls
    chat: Chat
    legacy_billing: LegacyBilling

    def begin(self) -> AbstractAsyncContextManager[Transaction]:
        """A transaction that commits when its block ends well; see `libs.domain.transaction`."""
        return transaction(self.database, self.bell)


def compose(settings: Settings, flags: Flags, *, metrics: Metrics, database: Database, bell: Bell) -> Runtime:
    """Puts the parts together; opens nothing."""
    live = LiveFlags(flags, database=database, metrics=metrics)
    recorder = Recorder(database, metrics, sample_rate=settings.decision_sample_rate)
    text_inactivity = timedelta(seconds=settings.text_inactivity_seconds)
    activity = Activity(database, inactivity=text_inactivity)
    guard = Guard(live, GuardTelemetry(metrics, recorder, activity))
    settlement = Settlement(metrics)
    field_keys = FieldKeys.parse(settings.field_keys.get_secret_value())
    bodies = Bodies(field_keys)
    chat = Chat(
        database,
        bell,
        guard,
        settlement,
        bodies,
        metrics,
        response_window=timedelta(seconds=settings.text_session_response_window_seconds),
        inactivity=text_inactivity,
        messages_per_minute=settings.chat_messages_per_minute,
    )
    return Runtime(
        settings=settings,
        metrics=metrics,
        database=database,
        bell=bell,
        recorder=recorder,
        activity=activity,
        flags=live,
        guard=guard,
        settlement=settlement,
        door=Door(guard, settlement),
        field_keys=field_keys,
        bodies=bodies,
        calls=Calls(
            settlement,
            ring_timeout=timedelta(seconds=settings.call_ring_timeout_seconds),
            inactivity=timedelta(seconds=settings.call_inactivity_seconds),
        ),
        chat=chat,
        legacy_billing=LegacyBilling(settlement, metrics),
    )


class Telemetry(NamedTuple):
    """How a process tells of itself."""

    metrics: Metrics
    logging: Logging


@asynccontextmanager
async def telemetry(settings: Settings, service: str) -> AsyncIterator[Telemetry]:
    """Logs, traces and metrics of a process, for as long as the block lasts."""
    sys.setswitchinterval(SWITCH_SECONDS)
    metrics = Metrics(CATALOGUE, version=VERSION, service=service)
    async with AsyncExitStack() as stack:
        logging = configure_logging(
            LogSettings(
                service=service,
                version=VERSION,
                level=settings.log_level,
                path=settings.log_file,
                message_bodies=settings.log_message_bodies,
                unmasked_debug=settings.log_unmasked_debug and settings.environment != "production",
                events=LOG_EVENTS,
            ),
            metrics,
        )
        stack.callback(logging.close)
        tracing = configure_tracing(service, VERSION, metrics, expected=(Refused,))
        stack.callback(tracing.shutdown)
        if tracing.tail:
            bus = KeepBus(tracing.tail, Channel(settings.redis_url, KEPT_TRACES))
            await stack.enter_async_context(bus.sharing())
        yield Telemetry(metrics, logging)


def thresholds_of(settings: Settings) -> Thresholds:
    """When the monitor alerts, as configured."""
    return Thresholds(
        backlog_warning=settings.backlog_warning,
        backlog_critical=settings.backlog_critical,
        backlog_window=settings.backlog_window_seconds,
        error_warning=settings.error_rate_warning,
        error_warning_window=settings.error_rate_warning_window_seconds,
        error_critical=settings.error_rate_critical,
        error_critical_window=settings.error_rate_critical_window_seconds,
    )


def flags_of(settings: FlagSettings) -> Flags:
    return Flags(**{flag.value.lower(): getattr(settings, flag.value) for flag in Flag})
