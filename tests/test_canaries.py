"""Canaries: what people write, who they are, and their secrets, sent through every route and every frame, in good
requests and bad ones, and then looked for in all that the program tells of itself."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args
from urllib.parse import quote, quote_plus

import asyncpg
import httpx2
import orjson
import pytest
from websockets.exceptions import InvalidStatus

from libs.domain.catalogue import CATALOGUE
from libs.guardrails import Principal
from libs.observability.testing import OtlpReceiver
from services.api.realtime.frames import ClientFrame
from tests.api.calls import Call, calls_of
from tests.clinic import Clinic, LiveSession
from tests.conftest import MakeApi, Urls
from tests.log_lines import lines_of
from tests.processes import running_api_process, running_worker, until
from tests.receiver import Receiver, receiving, register
from tests.running import Api
from tests.sockets import PROTOCOL, address, opened

WORDS: Final = "marigoldblossom hurts"
"""What somebody wrote: nothing tells it from harmless text but the place where it stands."""

SECRET: Final = "hunter2-4f9d"
IDENTITY: Final = f"canary.bird@nest.example +49 151 5550 1234 +4915155501234 Bearer {SECRET} password={SECRET}"
"""Who somebody is: recognised wherever it stands."""

CANARY: Final = f"{WORDS} {IDENTITY}"

SONGS: Final = ("marigold", "hunter2", "canary.bird", "151 5550", "15155501", "151%205550", "151+5550")
"""What of the canaries is looked for."""

ALERTS_TOKEN: Final = f"{SECRET}-of-alertmanager-that-is-long-enough"
TEXTS: Final = {"body", "reason", "description", "name", "plan", "client_message_id"}
"""Fields of bodies that take free text."""


def heard(text: str) -> list[str]:
    """Which canaries are in a text, with what is around them."""
    return [text[max(0, at - 80) : at + 40] for song in SONGS if (at := text.lower().find(song)) >= 0]


@pytest.mark.parametrize("place", ["{}", '{{"note": "{}"}}', 'x_total{{label="{}"}} 1.0', "/chat/{}/messages?q={}"])
@pytest.mark.parametrize("canary", [CANARY, quote(CANARY), quote_plus(CANARY), WORDS, IDENTITY, SECRET])
def test_a_canary_would_be_heard(place: str, canary: str) -> None:
    assert heard(place.format(canary, canary))


def test_silence_is_not_heard() -> None:
    assert heard("http_request 4f9d nest.example 1234 Bearer [redacted] ***.ple ***1234") == []


@dataclass(frozen=True)
class Told:
    """Everything that a run of the API and of a worker told of itself."""

    logs: list[Path]
    spans: list[Any]
    metrics: str
    stored: list[str]


async def spoiled(api: Api, call: Call) -> None:
    """The request with a canary in each of its parts, one after the other."""
    for name, _ in call.parameters("path"):
        await call.send(api, call.path(**{name: quote(CANARY, safe="")}))
    unknown = f"q={quote_plus(CANARY)}&token={SECRET}"
    for name in [name for name, _ in call.parameters("query")] or ["other"]:
        await call.send(api, f"{call.path()}?{name}={quote_plus(CANARY)}&{unknown}")
    headers = {
        "Idempotency-Key": CANARY,
        "X-Correlation-ID": CANARY,
        "X-Request-ID": CANARY,
        "X-Api-Key": SECRET,
        "X-Forwarded-For": WORDS,
        "Cookie": f"session={SECRET}; note={quote(CANARY)}",
        "Referer": f"https://example.org/?{unknown}",
        "User-Agent": f"okhttp/4 {IDENTITY}",
        "traceparent": f"00-{WORDS}-01",
        "tracestate": f"x={WORDS}",
        "baggage": f"user={quote(CANARY)}",
    }
    for authorization in (f"Bearer {SECRET}", f"Basic {SECRET}", CANARY):
        await call.send(api, headers=headers | {"Authorization": authorization})
    if call.takes_body:
        bodies: list[Any] = [call.body | {name: CANARY} for name in [*call.body, WORDS, "password"]]
        bodies += [{name: {"nested": [CANARY]} for name in call.body}, [CANARY], CANARY]
        for body in bodies:
            await call.send(api, json=body, headers=headers)
        await call.send(api, content=f'{{"body": "{CANARY}', headers={"Content-Type": "application/json"})
        await call.send(api, content=CANARY, headers={"Content-Type": f"text/plain; name={SECRET}"})


async def sung(api: Api, call: Call) -> httpx2.Response:
    """The good request, with canaries where a text may stand."""
    body = {name: f"{value} {CANARY}" if name in TEXTS else value for name, value in call.body.items()}
    if "client_message_id" in body:
        body["client_message_id"] = f"{WORDS}-{call.body['client_message_id']}"
    if "media_url" in body:
        body["media_url"] = f"https://example.org/{quote(CANARY)}?token={SECRET}"
    if call.template.endswith("process-deduction"):
        body["reason"] = call.body["reason"]
    request: dict[str, Any] = {"json": body} if body else {}
    return await call.send(api, **request)


async def in_frames(api: Api, session: LiveSession) -> None:
    """All frames there are, good ones and spoiled ones, on sockets whose handshakes are full of canaries as well."""
    where: dict[str, Any] = {"url": f"{address(api, session.context)}?token={SECRET}&q={quote_plus(CANARY)}"}
    headers = {"Cookie": f"session={SECRET}", "X-Correlation-ID": CANARY, "User-Agent": f"okhttp/4 {IDENTITY}"}
    denied: list[tuple[Principal | None, dict[str, Any]]] = [
        (None, {"headers": {"Authorization": f"Bearer {SECRET}"}}),
        (None, {"subprotocols": (PROTOCOL, f"ticket.{SECRET}")}),
        (session.patient, {"headers": {"Origin": f"https://marigoldblossom.{SECRET}.example"}}),
        (session.patient, {"subprotocols": ("marigoldblossom",)}),
    ]
    for caller, options in denied:
        with pytest.raises(InvalidStatus):
            async with opened(api, caller, session.context, **where | options):
                pass
    async with opened(api, session.patient, quote(CANARY, safe="")) as socket:
        assert await socket.close_code() is not None
    good: dict[str, dict[str, Any]] = {
        "hello": {"after_seq": 0},
        "message": {"client_message_id": f"{WORDS}-1", "body": CANARY, "media_url": f"https://example.org/{SECRET}"},
        "reply": {"client_message_id": f"{WORDS}-2", "body": CANARY, "message_id": 1},
        "reaction": {"message_id": 1, "emoji": "👍", "on": True},
        "typing": {"on": True},
        "read": {"seq": 1},
        "ping": {},
    }
    assert good.keys() == {get_args(frame.model_fields["type"].annotation)[0] for frame in get_args(ClientFrame)}
    async with opened(api, session.patient, session.context, headers=headers, **where) as socket:
        for type_, fields in good.items():
            await socket.send(type=type_, **fields)
            for name in (*fields, WORDS):
                await socket.send(type=type_, **fields | {name: CANARY})
        for text in (
            CANARY,
            orjson.dumps(CANARY).decode(),
            f'{{"type": "{CANARY}"}}',
            f'{{"type": "message", "{CANARY}',
        ):
            await socket.connection.send(text)
        await socket.connection.send(CANARY.encode())
        await socket.send(type="ping")
        while len(socket.of("pong")) < 2:
            await socket.receive()
    assert {message["body"] for frame in socket.of("ack") if (message := frame["message"])} == {CANARY}


async def in_alerts(api: Api) -> None:
    """What Alertmanager may send, and what it never would."""
    alert = {
        "fingerprint": "1",
        "status": "firing",
        "startsAt": "2030-01-01T00:00:00Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "labels": {"alertname": "Canary", "instance": CANARY},
        "annotations": {"summary": CANARY},
        "generatorURL": f"http://example.org/?q={quote_plus(CANARY)}",
    }
    bearer = {"Authorization": f"Bearer {ALERTS_TOKEN}"}
    for headers, alerts, status in (
        (bearer, [alert], 204),
        (bearer, [alert | {"startsAt": CANARY}, CANARY], 422),
        ({"Authorization": f"Bearer {CANARY}"}, [alert], 401),
    ):
        response = await api.anonymous.post(
            "/internal/alerts", json={"version": "4", "alerts": alerts}, headers=headers
        )
        assert response.status_code == status, response.text


async def to_a_database_that_refuses(api: Api, calls: list[Call], owner_url: str) -> None:
    """Good requests whose rows the database refuses, and quotes."""
    owner = await asyncpg.connect(owner_url)
    for template, table, text in (
        ("/chat/{context}/messages", "messages", "body"),
        ("/appointments", "appointments", "reason"),
    ):
        [call] = [call for call in calls if call.method == "POST" and call.template.endswith(template)]
        await owner.execute(f"ALTER TABLE {table} ADD CONSTRAINT refused CHECK ({text} IS NULL) NOT VALID")
        assert (await sung(api, call)).status_code == 500
        await owner.execute(f"ALTER TABLE {table} DROP CONSTRAINT refused")
    await owner.close()


async def to_strangers(api: Api) -> None:
    """Requests that no route answers, or a public one."""
    for path in ("/", "/problems/", "/api/v1/chat/", "/metrics/", "/docs/"):
        for method in ("GET", "POST", "PROPFIND"):
            await api.anonymous.request(
                method, f"{path}{quote(CANARY, safe='')}?q={quote_plus(CANARY)}", content=CANARY
            )
    await api.anonymous.get("/metrics", headers={"Authorization": f"Basic {SECRET}", "Accept": CANARY})


@pytest.fixture(params=["INFO", "DEBUG"])
async def told(
    request: pytest.FixtureRequest, make_api: MakeApi, clinic: Clinic, urls: Urls, tmp_path: Path
) -> AsyncIterator[Told]:
    """What both processes tell of all this, at that level of the log."""
    async with AsyncExitStack() as stack:
        collector = stack.enter_context(OtlpReceiver())
        receiver: Receiver = await stack.enter_async_context(receiving())
        settings = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_endpoint,
            "OTEL_TRACES_SAMPLER_ARG": "1",
            "SESSIONGATE_LOG_LEVEL": request.param,
            "SESSIONGATE_LOG_SEARCH_HOURS": "1",
            "SESSIONGATE_WEBHOOK_ALLOW_NETWORKS": "127.0.0.0/8",
            "SESSIONGATE_ALERTS_TOKEN": ALERTS_TOKEN,
        }
        # This one makes the good requests; the process that serves them must not share its log with their client.
        here = await make_api()
        session = await clinic.session()
        calls = await calls_of(here, clinic)
        taking, failing = [f"/{quote(CANARY)}/{answer}?token={SECRET}" for answer in (204, 500)]
        receiver.answers[failing] = [500]
        for path in (taking, failing):
            await register(clinic.database, clinic.operator, f"{receiver.url}{path}")

        logs = [tmp_path / "api.jsonl", tmp_path / "worker.jsonl"]
        process = await stack.enter_async_context(running_api_process(urls.app, urls.redis, logs[0], **settings))
        api = dataclasses.replace(here, url=process.url, anonymous=await stack.enter_async_context(process.client()))
        await in_frames(api, session)
        await in_alerts(api)
        await to_strangers(api)
        await to_a_database_that_refuses(api, calls, urls.owner)
        for call in calls:
            response = await sung(api, call)
            assert response.is_success, f"{call.method} {call.path()}: {response.text}"
            await spoiled(api, call)
        metrics = (await api.anonymous.get("/metrics")).text

        # Only now, since it would convert what some of the requests are about.
        worker = await stack.enter_async_context(running_worker(urls.app, urls.redis, logs[1], **settings))

        async def delivered() -> bool:
            return bool(receiver.at(taking) and receiver.at(failing) and worker.lines("outbox_failed"))

        await until(delivered)
        port = worker.lines("worker_started")[-1]["metrics_port"]
        async with httpx2.AsyncClient() as client:
            metrics += (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        assert await process.stop() == 0
        assert await worker.stop() == 0
        stored = [row["line"] for row in await clinic.fetch("SELECT line FROM log_lines")]
        yield Told(logs, collector.spans(), metrics, stored)


async def test_nothing_that_people_send_is_told_of_them(told: Told) -> None:
    for log in told.logs:
        assert [around for line in log.read_text().splitlines() for around in heard(line)] == []
    assert [around for span in told.spans for around in heard(str(span))] == []
    assert [around for line in told.metrics.splitlines() for around in heard(line)] == []
    assert [around for line in told.stored for around in heard(line)] == []
    it_was_really_told(told)


def it_was_really_told(told: Told) -> None:
    """Of nothing, nothing would be heard either."""
    api, worker = ([line["event"] for line in lines_of(log)] for log in told.logs)
    assert {"http_request", "auth_failed", "chat_message_stored", "chat_connection_closed", "alert_received"} <= {*api}
    assert {"outbox_dispatched", "outbox_failed", "worker_stopped"} <= {*worker}
    assert [line["event"] for line in lines_of(told.logs[0])].count("unhandled_error") == 2
    refused = {span.name for span in told.spans if 'violates check constraint "refused"' in span.status.message}
    assert {"chat.send", "scheduling.book"} <= refused
    assert len(told.spans) > 500
    assert len(told.stored) > 100
    assert {"http_request", "outbox_failed"} <= {orjson.loads(line)["event"] for line in told.stored}
    assert all(spec.name in told.metrics for spec in CATALOGUE)
