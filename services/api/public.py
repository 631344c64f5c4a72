"""The only routes that answer strangers: health, metrics, the problem pages.

`PUBLIC` is compared with what really answers an anonymous request; see tests/architecture.
"""

import asyncio
import html
from operator import attrgetter
from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from sqlalchemy.exc import SQLAlchemyError

from libs.domain.db import is_transient
from libs.guardrails import Reason, Refused
from libs.observability.exposition import MetricsAccess, render
from services.api.errors import STATUS, problem
from services.api.guards import runtime_of
from services.api.schemas import documented

PUBLIC: Final = frozenset(
    {"/healthz", "/readyz", "/metrics", "/problems/{code}", "/openapi.json", "/docs", "/docs/oauth2-redirect"}
)

DATABASE_SECONDS: Final = 2.0
"""A database that has not answered by then is not ready."""

PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked for every few seconds by machines."""

WORKER_SILENCE_SECONDS: Final = 10
"""A worker writes a heartbeat every second; after so much silence there is none."""

_CHECK: Final = "SELECT max(beat_at) > clock() - make_interval(secs => $1) FROM workers"

router = APIRouter(tags=["public"], generate_unique_id_function=attrgetter("name"))


@router.get("/healthz")
async def get_health() -> dict[str, str]:
    """200 while the process lives."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "The database does not answer."}})
async def get_readiness(request: Request) -> JSONResponse:
    """503 only without the database; without Redis or a worker it is `degraded` and still 200."""
    runtime = runtime_of(request)
    checks = {"database": "ok", "redis": "ok", "worker": "ok"}
    try:
        async with asyncio.timeout(DATABASE_SECONDS), runtime.database.autocommit() as connection:
            alive = await connection.fetchval(_CHECK, float(WORKER_SILENCE_SECONDS))
        checks["worker"] = "ok" if alive else "degraded"
    except Exception as error:
        if not (is_transient(error) or isinstance(error, SQLAlchemyError)):
            raise
        checks = {"database": "failed", "redis": "ok", "worker": "degraded"}
    if not await request.app.state.doorbell.is_reachable():
        checks["redis"] = "degraded"
    words = checks.values()
    status = "failed" if "failed" in words else "degraded" if "degraded" in words else "ok"
    return JSONResponse({"status": status, "checks": checks}, 503 if status == "failed" else 200)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=documented((401, Reason.UNAUTHENTICATED), (403, Reason.ROLE_NOT_ALLOWED)),
)
async def get_metrics(request: Request) -> Response:
    """Prometheus metrics, to an allow-listed peer or with basic auth."""
    access: MetricsAccess = request.app.state.metrics_access
    peer = request.client.host if request.client else None
    match access.verdict(request.headers.get("authorization"), peer):
        case "unauthenticated":
            refused = Refused(Reason.UNAUTHENTICATED, "The metrics ask for a user and a password of their own.")
            return problem(refused, request, {"WWW-Authenticate": 'Basic realm="metrics"'})
        case "forbidden":
            raise Refused(Reason.ROLE_NOT_ALLOWED)
    runtime = runtime_of(request)
    body, content_type = render(runtime.metrics, request.headers.get("accept", ""))
    return Response(body, media_type=content_type)


@router.get("/problems/{code}", response_class=HTMLResponse, responses=documented((404, Reason.NOT_FOUND)))
async def get_problem(code: str) -> HTMLResponse:
    """What a refusal means and what to do about it, for a person."""
    reason = Reason.__members__.get(code)
    if reason is None:
        raise Refused(Reason.NOT_FOUND)
    following = ""
    if reason.next_action:
        method, address = reason.next_action
        following = f"<p>Next: <code>{html.escape(method)} {html.escape(address)}</code></p>"
    return HTMLResponse(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{reason.code}</title>"
        "<style>body{font:1rem/1.5 system-ui;max-width:40rem;margin:4rem auto;padding:0 1rem}</style>"
        f"<p><code>{reason.code}</code> · HTTP {STATUS[reason.kind]}</p>"
        f"<h1>{html.escape(reason.title)}</h1><p>{html.escape(reason.help)}</p>{following}</html>"
    )
