"""Who may read the metrics, and what the small server of a worker answers to whom."""

import asyncio
import base64
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from libs.observability import exposition
from libs.observability.catalogue import DURATION_BUCKETS, Label, counter, histogram
from libs.observability.exposition import REQUEST_LIMIT, MetricsAccess, serve_metrics
from libs.observability.registry import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
# What Prometheus 2.42 sends.
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5"
)

SPECS = (
    counter("guests_total", "Guests", Label("table", ("a", "b"))),
    histogram("wait_seconds", "Wait", Label("table", ("a", "b"))),
)
BUCKETS_OF_A = [f"wait_seconds_bucket {bound} a" for bound in (*DURATION_BUCKETS, "+Inf")]
LOCAL = MetricsAccess.parse(None, "127.0.0.0/8")
PASSWORD = MetricsAccess.parse("prometheus:a:good:pässword", "")


def basic(credentials: str, scheme: str = "Basic") -> str:
    return f"{scheme} {base64.b64encode(credentials.encode()).decode()}"


def test_with_nothing_configured_nobody_may_read() -> None:
    nothing = MetricsAccess.parse(None, "")
    for authorization in (None, basic(":"), basic("a:b"), "Basic", ""):
        for peer in ("127.0.0.1", "::1", None):
            assert nothing.verdict(authorization, peer) == "forbidden"


@pytest.mark.parametrize(
    ("peer", "verdict"),
    [
        ("127.0.0.1", "ok"),
        ("127.255.0.9", "ok"),
        ("10.1.2.3", "ok"),
        ("::ffff:10.1.2.3", "ok"),
        ("fd00::5", "ok"),
        ("fd00::5%eth0", "ok"),
        ("10.2.2.3", "forbidden"),
        ("::ffff:10.2.2.3", "forbidden"),
        ("fd01::5", "forbidden"),
        ("::1", "forbidden"),
        ("localhost", "forbidden"),
        ("", "forbidden"),
        (None, "forbidden"),
    ],
)
def test_a_listed_network_opens_to_its_own_addresses_alone(peer: str | None, verdict: str) -> None:
    access = MetricsAccess.parse(None, " 127.0.0.0/8, 10.1.0.0/16 ,fd00::/16,")
    assert access.verdict(None, peer) == verdict


@pytest.mark.parametrize("scheme", ["Basic", "basic", "BASIC"])
def test_the_credentials_open_from_anywhere(scheme: str) -> None:
    for peer in ("203.0.113.7", None):
        assert PASSWORD.verdict(basic("prometheus:a:good:pässword", scheme), peer) == "ok"


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Basic",
        "Basic ",
        "Basic ????",
        "Basic ä",
        basic("prometheus:a:good:pässwor"),
        basic("prometheus:a:good:pässword2"),
        basic("prometheus:a"),
        basic("prometheus:"),
        basic("prometheus"),
        basic("Prometheus:a:good:pässword"),
        basic(":a:good:pässword"),
        basic("prometheus:a:good:pässword", "Bearer"),
        "prometheus:a:good:pässword",
    ],
)
def test_anything_else_is_asked_for_credentials(authorization: str | None) -> None:
    assert PASSWORD.verdict(authorization, "127.0.0.1") == "unauthenticated"


def test_credentials_or_a_listed_network_each_suffice() -> None:
    both = MetricsAccess.parse("prometheus:password", "10.0.0.0/8")
    assert both.verdict(None, "10.0.0.1") == "ok"
    assert both.verdict(basic("wrong:wrong"), "10.0.0.1") == "ok"
    assert both.verdict(basic("prometheus:password"), "203.0.113.7") == "ok"
    assert both.verdict(None, "203.0.113.7") == "unauthenticated"


@pytest.mark.parametrize("credentials", ["", ":", "user", "user:", ":password"])
def test_credentials_without_user_or_password_are_refused_unrepeated(credentials: str) -> None:
    with pytest.raises(ValueError, match=r"^The credentials for metrics must have the form user:password\.$"):
        MetricsAccess.parse(credentials, "")


@pytest.mark.parametrize("networks", ["10.0.0.0/99", "localhost", "10.0.0.0/8;127.0.0.1", "10.0.0.1/8", "*"])
def test_a_network_that_is_none_is_refused_in_a_sentence(networks: str) -> None:
    with pytest.raises(ValueError, match=r"^The networks that may read metrics: .+\.$"):
        MetricsAccess.parse(None, networks)


Serve = Callable[..., Awaitable[httpx2.AsyncClient]]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(SPECS, version="0", service="test")


@pytest.fixture
async def serve(metrics: Metrics) -> AsyncIterator[Serve]:
    """Serves `metrics` on a free port; answers a client of it."""
    async with AsyncExitStack() as stack:

        async def start(access: MetricsAccess = LOCAL) -> httpx2.AsyncClient:
            port = await stack.enter_async_context(serve_metrics(metrics, access, "127.0.0.1", 0))
            return await stack.enter_async_context(httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}"))

        yield start


def values(body: str) -> dict[str, float]:
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in parse_text(body)
        for sample in family.samples
    }


async def test_the_metrics_of_the_process_are_served(serve: Serve, metrics: Metrics) -> None:
    client = await serve()
    metrics.counter("guests_total", "a").inc(3)

    answer = await client.get("/metrics")

    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    assert answer.headers["Cache-Control"] == "no-store"
    assert values(answer.text)["guests_total a"] == 3
    assert (await client.get("/metrics?name=x")).status_code == 200


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [(PROMETHEUS, True), (OPENMETRICS, True), ("text/plain", False), ("*/*", False), ("text/html, image/*", False)],
)
async def test_the_scraper_chooses_the_format(serve: Serve, metrics: Metrics, accept: str, openmetrics: bool) -> None:
    client = await serve()
    metrics.histogram("wait_seconds", "a").observe(0.3, {"trace_id": "a" * 32})

    answer = await client.get("/metrics", headers={"Accept": accept})

    parse: Any = parse_openmetrics if openmetrics else parse_text
    families = {family.name: family for family in parse(answer.text)}
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text" if openmetrics else "text/plain")
    exemplars = [sample.exemplar.labels for sample in families["wait_seconds"].samples if sample.exemplar]
    assert exemplars == ([{"trace_id": "a" * 32}] if openmetrics else [])


async def test_head_answers_as_get_would_but_without_the_body(serve: Serve) -> None:
    client = await serve()
    for path in ("/metrics", "/healthz"):
        got, head = await client.get(path), await client.head(path)
        assert head.status_code == 200
        assert head.headers["Content-Type"] == got.headers["Content-Type"]
        # The gauges of the process itself move between the two.
        assert int(head.headers["Content-Length"]) == pytest.approx(len(got.content), rel=0.05)
        assert (await raw(client, f"HEAD {path} HTTP/1.1\r\n\r\n".encode())).endswith(b"\r\n\r\n")


async def test_health_needs_no_permission_and_other_addresses_do_not_exist(serve: Serve) -> None:
    client = await serve(PASSWORD)
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    for path in ("/", "/metrics/", "/Metrics", "/metrics/x", "/favicon.ico", "//metrics", "/healthz/"):
        assert (await client.get(path)).status_code == 404, path


async def test_nothing_can_be_changed_here(serve: Serve) -> None:
    client = await serve()
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "NONSENSE"):
        answer = await client.request(method, "/metrics")
        assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD"), method


async def test_a_stranger_reads_nothing(serve: Serve) -> None:
    for access, status in ((PASSWORD, 401), (MetricsAccess.parse(None, "10.0.0.0/8"), 403)):
        client = await serve(access)
        forwarded = {"X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.1", "X-Real-IP": "10.0.0.1"}
        for headers in ({}, forwarded, {"Authorization": basic("prometheus:guess")}):
            for method in ("GET", "HEAD"):
                answer = await client.request(method, "/metrics", headers=headers)
                assert (answer.status_code, answer.content) == (status, b"")
                assert ("WWW-Authenticate" in answer.headers) is (status == 401)


async def test_the_credentials_are_taken_from_the_header(serve: Serve) -> None:
    client = await serve(PASSWORD)
    assert (await client.get("/metrics", auth=("prometheus", "a:good:pässword"))).status_code == 200
    assert (await client.get("/metrics", auth=("prometheus", "a"))).status_code == 401


async def test_scrapes_during_updates_are_whole_and_never_go_back(serve: Serve, metrics: Metrics) -> None:
    client = await serve()
    enough = threading.Event()

    def work(table: str) -> None:
        guests, wait = metrics.counter("guests_total", table), metrics.histogram("wait_seconds", table)
        while not enough.wait(0.0001):
            for _ in range(20):
                guests.inc()
                wait.observe(0.3)

    workers = [threading.Thread(target=work, args=(table,)) for table in ("a", "b")]
    for worker in workers:
        worker.start()
    try:
        scrapes = [values((await client.get("/metrics")).text) for _ in range(15)]
    finally:
        enough.set()
        for worker in workers:
            worker.join()

    for earlier, later in pairwise(scrapes):
        assert set(earlier) == set(later)
        for series in ("guests_total a", "guests_total b", "wait_seconds_count a", "wait_seconds_sum b"):
            assert earlier[series] <= later[series]
    assert scrapes[-1]["guests_total a"] > scrapes[0]["guests_total a"]
    for scrape in scrapes:
        buckets = [scrape[series] for series in BUCKETS_OF_A]
        assert buckets == sorted(buckets)
        assert buckets[-1] == scrape["wait_seconds_count a"]
    final = values((await client.get("/metrics")).text)
    for table in ("a", "b"):
        assert final[f"guests_total {table}"] == metrics.sample("guests_total", table=table)
        assert final[f"guests_total {table}"] == final[f"wait_seconds_count {table}"]


async def raw(client: httpx2.AsyncClient, request: bytes) -> bytes:
    """What the server sends before it closes the connection."""
    assert client.base_url.port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(request)
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_one_connection_is_one_request(serve: Serve) -> None:
    client = await serve()
    answer = await raw(client, b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n" * 2)
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert b"Connection: close" in answer


async def test_names_of_headers_are_read_in_any_case(serve: Serve) -> None:
    client = await serve(PASSWORD)
    authorization = basic("prometheus:a:good:pässword").encode()
    answer = await raw(client, b"GET /metrics HTTP/1.0\r\nAUTHORIZATION:" + authorization + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "request_",
    [b"\r\n\r\n", b"GET\r\n\r\n", b"\x00\xff\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET  /metrics\r\n\r\n"],
)
async def test_nonsense_is_answered_with_an_error_and_breaks_nothing(serve: Serve, request_: bytes) -> None:
    client = await serve()
    assert (await raw(client, request_)).startswith(b"HTTP/1.1 40")
    assert (await client.get("/metrics")).status_code == 200


async def test_a_client_that_is_slow_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "REQUEST_DEADLINE", 0.1)
    client = await serve()
    assert await raw(client, b"GET /metrics HTTP/1.1\r\n") == b""
    assert (await client.get("/metrics")).status_code == 200


async def test_a_client_that_sends_too_much_is_cut_off_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "REQUEST_DEADLINE", 60)
    client = await serve()
    assert await raw(client, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 2 * REQUEST_LIMIT) == b""
    assert (await client.get("/metrics")).status_code == 200


async def test_a_client_that_does_not_read_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "REQUEST_DEADLINE", 0.2)
    monkeypatch.setattr(exposition, "render", lambda *_: (b"x" * 50_000_000, "text/plain"))
    client = await serve()
    assert client.base_url.port is not None
    answering = asyncio.all_tasks()
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(5):
        while not asyncio.all_tasks() - answering:
            await asyncio.sleep(0.01)
        while asyncio.all_tasks() - answering:
            await asyncio.sleep(0.01)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        with suppress(ConnectionError):
            while chunk := await reader.read(1_000_000):
                received += len(chunk)
    writer.close()
    assert 0 < received < 50_000_000


async def test_the_port_is_free_again_after_the_block(metrics: Metrics) -> None:
    async with serve_metrics(metrics, LOCAL, "127.0.0.1", 0) as port:
        with pytest.raises(OSError, match="address already in use"):
            async with serve_metrics(metrics, LOCAL, "127.0.0.1", port):
                pass
    async with serve_metrics(metrics, LOCAL, "127.0.0.1", port) as again:
        assert again == port
