"""The live stack: an API and a worker that somebody uses, a Prometheus that scrapes them, and an Alertmanager."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from deploy.generate.alertmanager import PEOPLE
from libs.domain.db import Database
from libs.guardrails import Principal
from libs.observability.testing import OtlpReceiver
from services.cli.embedded import LOGIN, Servers
from tests.clinic import Clinic
from tests.deploy.monitoring import Prometheus, installed, running_alertmanager, running_prometheus
from tests.processes import ApiProcess, Worker, free_port, running_api_process, running_worker, until
from tests.receiver import Receiver, receiving
from tests.running import ALERTS_TOKEN
from tests.servers import copy_of, url_of

RATES = "count(sum_over_time(up[1m]) > 2) == 4"
"""True when every target was scraped often enough for rates."""

USED = 'sum(rate(http_request_duration_seconds_count{route="/api/v1/sessions/{context}/end"}[1m])) >= 0'
"""True when what the last request counted is a rate."""


@dataclass
class Stack:
    """What runs, an operator of the API's, and what whoever is on call was told. A worker that was killed is started
    again at the same address."""

    api: ApiProcess
    worker: Worker
    start_worker: Callable[[], Awaitable[Worker]]
    prometheus: Prometheus
    operator: Principal
    oncall: Receiver


@pytest.fixture(scope="module")
async def stack(servers: Servers, migrated: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    for program in ("prometheus", "prometheus-alertmanager"):
        installed(program)
    folder = tmp_path_factory.mktemp("monitoring")
    async with AsyncExitStack() as stack:
        # Prometheus takes seconds to look at its targets for the first time; they are started meanwhile.
        api_port, worker_port = free_port(), free_port()
        oncall = await stack.enter_async_context(receiving())
        receivers = {"api": f"http://127.0.0.1:{api_port}/internal/alerts"}
        receivers |= {name: f"{oncall.url}/{name}" for name in PEOPLE}
        tokens = {"api": ALERTS_TOKEN, "oncall": "a token of whoever is on call"}
        alertmanager = await stack.enter_async_context(running_alertmanager(folder / "alertmanager", receivers, tokens))
        addresses = {
            "api:8000": f"127.0.0.1:{api_port}",
            "worker:9101": f"127.0.0.1:{worker_port}",
            "alertmanager:9093": alertmanager,
        }
        prometheus = await stack.enter_async_context(running_prometheus(folder / "prometheus", addresses))

        name = await stack.enter_async_context(copy_of(servers, migrated, "monitored"))
        url, redis_url = url_of(servers, name, LOGIN), f"{servers.redis_url}?db=1"  # nobody else's jobs
        collector = stack.enter_context(OtlpReceiver())
        tracing = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_endpoint, "OTEL_TRACES_SAMPLER_ARG": "1"}
        serving = tracing | {"SESSIONGATE_API_PORT": str(api_port), "SESSIONGATE_ALERTS_TOKEN": ALERTS_TOKEN}
        api = await stack.enter_async_context(running_api_process(url, redis_url, folder / "api.jsonl", **serving))
        working = tracing | {
            "SESSIONGATE_WORKER_METRICS_PORT": str(worker_port),
            "SESSIONGATE_AUDIT_INTERVAL_SECONDS": "1",
        }

        async def start_worker() -> Worker:
            return await stack.enter_async_context(running_worker(url, redis_url, folder / "worker.jsonl", **working))

        worker = await start_worker()
        await until(lambda: prometheus.query(RATES), seconds=60)
        database = Database(url, application="tests", pool_size=2)
        clinic = await Clinic.open(database)
        await use(api, clinic)
        await database.close()
        await until(lambda: prometheus.query(USED), seconds=60)
        await until(prometheus.has_evaluated_every_rule)
        yield Stack(api, worker, start_worker, prometheus, clinic.operator, oncall)


@pytest.fixture
def prometheus(stack: Stack) -> Prometheus:
    """A Prometheus with all generated rules, which scrapes an API and a worker that have been used."""
    return stack.prometheus


async def use(api: ApiProcess, clinic: Clinic) -> None:
    """A consultation by text, from booking to its end; and a stranger."""
    doctor, patient = await clinic.doctor(), await clinic.patient()
    async with api.client() as strangers, api.client(doctor) as doctors, api.client(patient) as patients:
        await strangers.get("/api/v1/me")
        starts_at = await clinic.fetchval("SELECT clock()") + timedelta(seconds=1)
        new = {"doctor_id": doctor.user_id, "modality": "text", "starts_at": starts_at.isoformat()}
        appointment_id = (await patients.post("/appointments", json=new)).json()["id"]
        await doctors.post(f"/appointments/{appointment_id}/confirm")

        async def context() -> Any:
            return (await patients.get(f"/appointments/{appointment_id}/session")).json()["session_context"]

        message = {"client_message_id": "1", "body": "Hello"}
        await patients.post(f"/chat/{appointment_id}/messages", json=message)
        sent = await patients.post(f"/chat/{await until(context)}/messages", json=message)
        assert sent.status_code == 201, sent.text
        ended = await patients.post(f"/sessions/{await context()}/end")
        assert ended.status_code == 200, ended.text
