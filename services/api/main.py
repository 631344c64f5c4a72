"""The API's composition root: settings in, a running server out. Nothing below reads a global."""

import gc
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import uvicorn
import uvloop
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.metrics import NoOpMeterProvider

from libs.domain.db import Database
from libs.domain.doorbell import Doorbell
from libs.domain.logs.sink import searchable
from libs.domain.runtime import VERSION, Runtime, compose, flags_of, telemetry
from libs.domain.settings import FlagSettings, libpq_dsn, load
from libs.observability.exposition import MetricsAccess
from libs.observability.http import UNMATCHED, HttpTelemetry, RequestTracing
from libs.observability.loop import watch_loop
from libs.observability.tracing import tracer_provider
from services.api import errors, internal, public
from services.api.admin.alerts import router as admin_alerts
from services.api.admin.decisions import router as decisions
from services.api.admin.flags import router as admin_flags
from services.api.admin.outbox import router as admin_outbox
from services.api.admin.routes import router as admin
from services.api.admin.webhooks import router as admin_webhooks
from services.api.appointments.routes import router as appointments
from services.api.billing import legacy
from services.api.billing import routes as billing
from services.api.chat.routes import router as chat
from services.api.identity import Identity, identity_of
from services.api.joined_writes import HttpProtocol
from services.api.middleware import BoundedBody, SecurityHeaders
from services.api.notifications.routes import router as notifications
from services.api.openapi import DocumentedApi
from services.api.people.routes import router as people
from services.api.realtime.connections import Connections
from services.api.realtime.handshake import Handshake
from services.api.realtime.rooms import Rooms, open_rooms
from services.api.realtime.routes import router as realtime
from services.api.realtime.slots import Slots, open_slots
from services.api.realtime.wire import Wire
from services.api.sessions.routes import router as sessions
from services.api.settings import ApiSettings, origins_of

# In the order in which a request tries them, the busiest first.
ROOMS: Final = (
    *(chat, sessions, billing.sessions_router, appointments, realtime, notifications, people),
    *(billing.balance_router, admin, billing.operators_router, decisions, admin_flags, admin_outbox, admin_webhooks),
    *(admin_alerts, legacy.router),
)
UNGUARDED: Final = (public.router, internal.router)
FOREIGN: Final = ("/internal/", "/webhooks/")
"""What other systems call; see `RequestTracing`."""
GRACE_SECONDS: Final = 15
FRAME_LIMIT: Final = 65_536
PING_SECONDS: Final = 20
GC_THRESHOLDS: Final = (10_000, 20, 100)

_DESCRIPTION: Final = (
    "Nothing live happens without a session: chat and billing address a session context such as"
    " `text_session:7`. Every refusal is a problem document whose `code` and `next_action` say what to do."
)


def create_app(
    runtime: Runtime,
    settings: ApiSettings,
    *,
    identity: Identity,
    doorbell: Doorbell,
    access: MetricsAccess,
    rooms: Rooms,
    slots: Slots,
) -> FastAPI:
    """The application around an open runtime."""
    app = DocumentedApi(
        title="Sessiongate",
        version=VERSION,
        description=_DESCRIPTION,
        docs_url="/docs" if settings.docs_enabled else None,
        openapi_url="/openapi.json" if settings.docs_enabled else None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # all three are our own
    )
    app.state.runtime = runtime
    app.state.identity = identity
    app.state.doorbell = doorbell
    app.state.metrics_access = access
    app.state.rooms = rooms
    app.state.alerts_token = settings.alerts_token
    connections = Connections(slots, runtime.metrics)
    app.state.connections = connections
    app.state.handshake = Handshake(
        identity, runtime.database, connections, runtime.metrics, origins=origins_of(settings.allowed_origins)
    )
    # Not included: the application would look for the route of each request twice. And before those of its documents.
    app.router.routes[:0] = [route for router in (*ROOMS, *UNGUARDED) for route in router.routes]
    errors.install(app, runtime.metrics)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(HttpTelemetry, metrics=runtime.metrics, route_of=RouteTemplates(app), quiet=public.PROBES)
    # Around the telemetry: lingering is not latency.
    app.add_middleware(
        BoundedBody,
        limit=settings.request_body_limit,
        longer=internal.BODY_LIMITS,
        seconds=settings.request_deadline_seconds,
    )
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=tracer_provider(),
        meter_provider=NoOpMeterProvider(),  # the metrics are our own
        exclude_spans=["receive", "send"],
    )
    return app


class RouteTemplates:
    """The template of the route that answered, such as `/api/v1/appointments/{appointment_id}`.

    They are looked up by endpoint: of the routes of its documents the framework leaves nothing else in the scope.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._templates: dict[Any, str] | None = None

    def __call__(self, scope: Any) -> str:
        if self._templates is None:
            contexts = iter_route_contexts(self._app.routes)
            self._templates = {
                context.endpoint: context.path for context in contexts if context.endpoint and context.path
            }
        return self._templates.get(scope.get("endpoint"), UNMATCHED)


@asynccontextmanager
async def open_app(settings: ApiSettings, flags: FlagSettings) -> AsyncIterator[FastAPI]:
    """Everything the API needs, opened; closed again in reverse order."""
    async with telemetry(settings, "sessiongate-api") as (metrics, logging):
        identity = await identity_of(settings, metrics)
        secret = settings.metrics_basic_auth
        access = MetricsAccess.parse(secret.get_secret_value() if secret else None, settings.metrics_allow)
        database = Database(
            libpq_dsn(settings.database_url), application="sessiongate-api", pool_size=settings.pool_size
        ).observed(metrics, "api")
        doorbell = Doorbell(settings.redis_url, metrics)
        try:
            runtime = compose(settings, flags_of(flags), metrics=metrics, database=database, bell=doorbell)
            async with (
                searchable(logging, settings, database, metrics),
                watch_loop(metrics),
                runtime.flags.following(),
                runtime.recorder.writing(),
                runtime.activity.writing(),
                open_rooms(runtime, doorbell) as rooms,
                open_slots(database, per_user=settings.sockets_per_user) as slots,
            ):
                yield create_app(
                    runtime, settings, identity=identity, doorbell=doorbell, access=access, rooms=rooms, slots=slots
                )
        finally:
            await doorbell.close()
            await database.close()


def server_config(app: FastAPI, settings: ApiSettings) -> uvicorn.Config:
    return uvicorn.Config(
        RequestTracing(app, untraced=public.PROBES, foreign=FOREIGN),
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        lifespan="off",
        http=HttpProtocol,
        ws=Wire,
        # Compressing each frame for each socket of a room would halve what one process delivers.
        ws_per_message_deflate=False,
        ws_max_size=FRAME_LIMIT,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS,
    )


async def serve(settings: ApiSettings, flags: FlagSettings) -> None:
    async with open_app(settings, flags) as app:
        # What is alive now stays alive: without this, full collections of it make the slowest requests. What requests
        # leave behind has few cycles: to look for them as often as Python does would take a tenth of each request.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        # Once stopped, the server raises the signal that stopped it again: that must not end the process
        # before traces and logs are flushed and the pools are closed.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        await uvicorn.Server(server_config(app, settings)).serve()


def main() -> None:
    settings, flags = load(ApiSettings), load(FlagSettings)
    try:
        uvloop.run(serve(settings, flags))
    except (ValueError, OSError) as error:
        sys.exit(f"The API cannot start: {error}")
