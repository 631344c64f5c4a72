"""What answers everybody: health, metrics, the problem pages, the documentation, and every refusal's shape."""

import base64
import re
from typing import Any
from uuid import UUID

from httpx2 import Response
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from libs.domain.catalogue import CATALOGUE
from libs.guardrails import Flag, Reason
from services.api.errors import STATUS
from services.api.public import PUBLIC, WORKER_SILENCE_SECONDS
from tests.api.expect import found, problem
from tests.clinic import Clinic
from tests.conftest import MakeApi, Urls
from tests.running import Api, running_api

NO_DATABASE = "postgresql://nobody@127.0.0.1:1/nothing"
NO_REDIS = "redis://127.0.0.1:1"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
UUID_OF_CLIENT = "550e8400-e29b-41d4-a716-446655440000"


def basic(credentials: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(credentials.encode()).decode()}


async def readiness(api: Api, status: int = 200) -> tuple[str, dict[str, str]]:
    body = found(await api.anonymous.get("/readyz"), status)
    assert set(body) == {"status", "checks"}
    return body["status"], body["checks"]


async def test_the_process_is_healthy_whatever_it_depends_on() -> None:
    async with running_api(NO_DATABASE, NO_REDIS) as api:
        assert found(await api.anonymous.get("/healthz")) == {"status": "ok"}


async def test_readiness_needs_the_database_and_only_prefers_the_rest(api: Api, clinic: Clinic, urls: Urls) -> None:
    assert await readiness(api) == ("degraded", {"database": "ok", "redis": "ok", "worker": "degraded"})

    await clinic.fetch("INSERT INTO workers (name) VALUES ('a worker')")
    assert await readiness(api) == ("ok", {"database": "ok", "redis": "ok", "worker": "ok"})

    async with running_api(urls.app, NO_REDIS) as without:
        assert await readiness(without) == ("degraded", {"database": "ok", "redis": "degraded", "worker": "ok"})
    async with running_api(NO_DATABASE, urls.redis) as without:
        checks = {"database": "failed", "redis": "ok", "worker": "degraded"}
        assert await readiness(without, 503) == ("failed", checks)

    await clinic.fetch("UPDATE workers SET beat_at = clock() - make_interval(secs => $1)", WORKER_SILENCE_SECONDS + 0.1)
    assert (await readiness(api))[1]["worker"] == "degraded"


async def test_metrics_are_for_networks_on_the_list_and_for_nobody_by_default(api: Api, make_api: MakeApi) -> None:
    assert (await api.anonymous.get("/metrics")).status_code == 200
    for allow in ("", "10.0.0.0/8"):
        closed = await make_api(metrics_allow=allow)
        for headers in ({}, {"X-Forwarded-For": "10.0.0.1"}, {"Forwarded": "for=10.0.0.1"}, basic("user:password")):
            problem(await closed.anonymous.get("/metrics", headers=headers), 403, "ROLE_NOT_ALLOWED")


async def test_metrics_are_for_those_who_know_the_password(make_api: MakeApi) -> None:
    api = await make_api(metrics_allow="10.0.0.0/8", metrics_basic_auth="scraper:a:secret")
    assert (await api.anonymous.get("/metrics", headers=basic("scraper:a:secret"))).status_code == 200
    for headers in ({}, basic("scraper:a"), basic("scraper:a:secret2"), basic("other:a:secret"), basic("scraper")):
        refused = await api.anonymous.get("/metrics", headers=headers)
        problem(refused, 401, "UNAUTHENTICATED")
        assert refused.headers["www-authenticate"] == 'Basic realm="metrics"'


async def test_every_series_that_can_be_known_is_scraped_from_the_start(api: Api) -> None:
    text = await api.anonymous.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=")
    scraped = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(text.text)
        for sample in family.samples
    }
    for spec in CATALOGUE:
        suffix = "_count" if spec.kind == "histogram" else ""
        for values in spec.series():
            labels = zip((label.name for label in spec.labels), map(str, values), strict=True)
            value = scraped[spec.name + suffix, frozenset(labels)]
            if spec.kind != "gauge":
                assert value == 0, spec.name
    for flag in Flag:
        value = scraped["feature_flag_enabled", frozenset({("flag", flag.value)})]
        assert value == (flag is not Flag.ALLOW_LEGACY_APPOINTMENT_CHAT)
    assert scraped["db_connections_max", frozenset({("pool", "api")})] == api.runtime.database.max_connections


async def test_a_scraper_that_asks_for_openmetrics_gets_it(api: Api) -> None:
    response = await api.anonymous.get("/metrics", headers={"Accept": OPENMETRICS})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.text.endswith("# EOF\n")
    families = {family.name for family in parse_openmetrics(response.text)}  # type: ignore[no-untyped-call]
    assert families >= {spec.name.removesuffix("_total") for spec in CATALOGUE}


async def test_requests_are_measured_by_template_and_never_by_path(api: Api, clinic: Clinic) -> None:
    await api.as_(clinic.operator).get("/appointments/4711")
    await api.as_(clinic.operator).get("/no/such/address/4711")
    exposition = (await api.anonymous.get("/metrics")).text
    assert "4711" not in exposition
    for route in ("/api/v1/appointments/{appointment_id}", "unmatched"):
        labels = {"route": route, "method": "GET", "status": "404"}
        assert api.runtime.metrics.sample("http_request_duration_seconds_count", **labels) == 1


async def test_every_problem_is_explained_to_people(api: Api) -> None:
    for reason in Reason:
        page = await api.anonymous.get(f"/problems/{reason.code}")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        text = page.text.replace("&#x27;", "'")
        for said in (reason.code, f"HTTP {STATUS[reason.kind]}", reason.title, reason.help):
            assert said in text
        assert ("Next:" in text) == (reason.next_action is not None)
    for code in ("NOBODY_KNOWS", "not_found", "<script>", "%00", "%ED%A0%80", "kind"):
        refused = await api.anonymous.get(f"/problems/{code}")
        problem(refused, 404, "NOT_FOUND")
        assert "<script>" not in refused.text


async def test_the_documentation_is_served_unless_it_is_switched_off(api: Api, make_api: MakeApi) -> None:
    assert "/openapi.json" in (await api.anonymous.get("/docs")).text
    closed = await make_api(docs_enabled=False)
    for path in ("/docs", "/openapi.json", "/redoc"):
        problem(await closed.anonymous.get(path), 404, "NOT_FOUND")


async def test_the_document_tells_how_to_sign_in_and_what_every_refusal_looks_like(api: Api) -> None:
    document = found(await api.anonymous.get("/openapi.json"))
    operations = {
        (path, method): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    ids = [operation["operationId"] for operation in operations.values()]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)+", name) for name in ids)
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for (path, _), operation in operations.items():
        assert operation.get("security", []) == ([] if path in PUBLIC else [{"bearer": []}])
        refusals = {status: response for status, response in operation["responses"].items() if status >= "4"}
        if path not in PUBLIC:
            assert set(refusals) >= {"401", "403", "422", "503"}
        for response in refusals.values():
            if path != "/readyz":
                schema = {"$ref": "#/components/schemas/Problem"}
                assert response["content"] == {"application/problem+json": {"schema": schema}}
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_a_correlation_id_of_the_client_is_kept_and_anything_else_replaced(api: Api) -> None:
    for offered in (UUID_OF_CLIENT, UUID_OF_CLIENT.upper(), "0123456789abcdef" * 2):
        response = await api.anonymous.get("/nowhere", headers={"X-Correlation-ID": offered})
        assert response.headers["x-correlation-id"] == problem(response, 404, "NOT_FOUND")["correlation_id"] == offered
    others: list[Any] = ["", "7", UUID_OF_CLIENT + "0", f"{{{UUID_OF_CLIENT}}}", "g" * 32, b"\xff\xfe", "a" * 10_000]
    seen = set()
    for headers in ({}, *({"X-Correlation-ID": offered} for offered in others)):
        [given] = (await api.anonymous.get("/healthz", headers=headers)).headers.get_list("x-correlation-id")
        assert UUID(given).version == 4
        seen.add(given)
    assert len(seen) == 8


async def test_an_address_that_does_not_exist_is_a_problem_too(api: Api, clinic: Clinic) -> None:
    for client in (api.anonymous, api.as_(clinic.operator)):
        for path in ("/nowhere", "/api/v2/me", "/api/v1/me/", "/me/../nowhere", "/%00", "/%ED%A0%80"):
            problem(await client.get(path), 404, "NOT_FOUND")


async def test_a_method_that_is_not_answered_is_told_which_are(api: Api) -> None:
    for method, path, allowed in (
        ("DELETE", "/api/v1/appointments", "GET, POST"),
        ("PATCH", "/api/v1/chat/text_session:1/messages", "GET, POST"),
        ("PUT", "/api/v1/me", "GET"),
        ("GET", "/api/v1/sessions/text_session:1/end", "POST"),
        ("OPTIONS", "/api/v1/admin/users/1", "PATCH"),
        ("POST", "/healthz", "GET"),
        ("TRACE", "/metrics", "GET"),
    ):
        refused = await api.anonymous.request(method, path)
        problem(refused, 405, "METHOD_NOT_ALLOWED")
        assert refused.headers["allow"] == allowed, path


async def test_no_answer_may_be_kept_guessed_framed_or_read_by_other_sites(api: Api, clinic: Clinic) -> None:
    def is_guarded(response: Response) -> bool:
        wanted = {
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "content-security-policy": "frame-ancestors 'none'",
            "referrer-policy": "no-referrer",
            "strict-transport-security": "max-age=31536000",
        }
        unwanted = {"server", "access-control-allow-origin", "access-control-allow-credentials", "set-cookie"}
        return wanted.items() <= dict(response.headers).items() and not unwanted & set(response.headers)

    foreign = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "GET"}
    for path in (*PUBLIC, "/nowhere", "/api/v1/me"):
        assert is_guarded(await api.anonymous.get(path.replace("{code}", "NOT_FOUND"), headers=foreign)), path
        assert is_guarded(await api.anonymous.options(path, headers=foreign)), path
    assert is_guarded(await api.as_(clinic.operator).get("/me", headers=foreign))
