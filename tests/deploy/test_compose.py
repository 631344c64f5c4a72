"""deploy/compose.yaml, .env.example and the collector, as far as they can be judged without containers."""

import re
from ipaddress import IPv4Network, ip_address, ip_network
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values
from pydantic_settings import BaseSettings

from libs.domain.sealing import new_key
from libs.domain.settings import DatabaseSettings, FlagSettings, Settings, variable
from services.api.main import GRACE_SECONDS as API_GRACE
from services.api.settings import ApiSettings
from services.worker.main import GRACE_SECONDS as WORKER_GRACE
from services.worker.settings import WorkerSettings
from tests.deploy.files import (
    API_PORT,
    DEPLOY,
    ROOT,
    WORKER_PORT,
    documents,
    faults,
    is_pinned,
    known_variables,
    texts,
)

(COMPOSE,) = documents(DEPLOY / "compose.yaml")
(COLLECTOR,) = documents(DEPLOY / "otel/collector.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("migrate", "api", "worker")
EXAMPLE = DEPLOY / ".env.example"
OF_COMPOSE = {"OWNER_PASSWORD", "APP_PASSWORD", "GRAFANA_PASSWORD", "ONCALL_TOKEN", "TRACES_ENDPOINT"}
"""Variables that the program knows nothing of."""
VARIABLE = re.compile(r"\$\{(\w+)(?::[?-](\w*))?\}")


def passed(service: dict[str, Any]) -> dict[str, str | None]:
    """The variables of a service; one without a value has that of the environment file, and none where it has none."""
    return dict(service.get("environment", {}))


def test_it_says_nothing_that_compose_does_not_understand() -> None:
    assert faults(COMPOSE, "compose") == []
    assert faults(COMPOSE | {"services": {"api": SERVICES["api"] | {"read-only": True}}}, "compose") != []


def test_every_image_is_pinned() -> None:
    assert [service["image"] for service in SERVICES.values() if not is_pinned(service["image"])] == []
    assert not any(map(is_pinned, ("redis", "redis:latest", "redis:7", "localhost:5000/redis", "redis:7.4.5-")))


def test_every_folder_and_file_that_it_mounts_is_there() -> None:
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())]
    files = [source for source in mounted if source.startswith(".")]
    assert [source for source in files if not (DEPLOY / source).exists()] == []
    assert {source for source in mounted if not source.startswith(".")} == COMPOSE["volumes"].keys()
    for name in OURS:
        build = SERVICES[name]["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).exists()


def test_our_own_can_change_nothing_and_nobody_is_reached_from_elsewhere() -> None:
    for name in OURS:
        assert SERVICES[name]["read_only"] is True
        assert SERVICES[name]["cap_drop"] == ["ALL"]
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) == 4
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_it_insists_on_nothing_but_variables_of_the_example_and_reads_all_of_those() -> None:
    example = dotenv_values(EXAMPLE).keys()
    assert {name for text in texts(COMPOSE) for name in re.findall(r"\$\{(\w+):\?", text)} <= example
    read = {name for text in texts(COMPOSE) for name in re.findall(r"\$\{(\w+)", text)}
    read |= {secret["environment"] for secret in COMPOSE["secrets"].values()}
    read |= {name for service in SERVICES.values() for name, value in passed(service).items() if value is None}
    assert example <= read


@pytest.mark.parametrize(("name", "settings"), [("api", ApiSettings), ("worker", WorkerSettings)])
def test_whatever_setting_is_in_the_env_file_reaches_the_services(name: str, settings: type[BaseSettings]) -> None:
    variables = {variable(kind, field) for kind in (settings, FlagSettings) for field in kind.model_fields}
    variables |= {each for each in known_variables() if each.startswith("OTEL_")}
    elsewhere = {
        variable for variable in variables if re.search("_(HOST|PORT|LOG_FILE|MIGRATIONS_DATABASE_URL)$", variable)
    }
    tokens = {each for each in variables if "_JWT_" in each} if name == "worker" else set()
    given = passed(SERVICES[name])
    assert given.keys() == variables - elsewhere - tokens
    fixed = {each: value for each, value in given.items() if value is not None and not value.startswith(f"${{{each}:")}
    assert fixed.keys() == {"SESSIONGATE_METRICS_ALLOW"}


def test_every_variable_is_a_setting_and_every_required_setting_is_in_the_example() -> None:
    example = dotenv_values(EXAMPLE).keys()
    assert example - known_variables() == OF_COMPOSE
    for name in OURS:
        assert SERVICES[name]["environment"].keys() - known_variables() == set()
    required = {
        variable(settings, name)
        for settings in (DatabaseSettings, Settings, ApiSettings, WorkerSettings, FlagSettings)
        for name, field in settings.model_fields.items()
        if field.is_required()
    }
    flags = {variable(FlagSettings, name) for name in FlagSettings.model_fields}
    assert required | flags <= example
    for name in ("api", "worker"):
        assert required | flags <= SERVICES[name]["environment"].keys()


def test_the_example_once_filled_in_is_what_the_services_start_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "OWNER_PASSWORD": "word",
        "APP_PASSWORD": "word",
        "SESSIONGATE_JWT_SECRET": "s" * 32,
        "SESSIONGATE_ALERTS_TOKEN": "t" * 32,
        "SESSIONGATE_FIELD_KEYS": new_key("2030"),
    }
    filled = EXAMPLE.read_text()
    for name, value in values.items():
        filled = filled.replace(f"\n{name}=\n", f"\n{name}={value}\n")
    (tmp_path / ".env").write_text(filled)
    given = {name: value or "" for name, value in dotenv_values(tmp_path / ".env").items()}
    loads: dict[str, tuple[Any, ...]] = {
        "migrate": (DatabaseSettings,),
        "api": (ApiSettings, FlagSettings),
        "worker": (WorkerSettings, FlagSettings),
    }
    for name, classes in loads.items():
        with monkeypatch.context() as environment:
            for key, value in SERVICES[name]["environment"].items():
                shown = given.get(key, "") if value is None else value
                environment.setenv(key, re.sub(VARIABLE, lambda match: given.get(match[1]) or match[2] or "", shown))
            settings, *flags = [each(_env_file=None) for each in classes]
        role = "owner" if name == "migrate" else "app"
        assert settings.database_url == f"postgresql://sessiongate_{role}:word@postgres:5432/sessiongate"
        assert [dict(each) for each in flags] == [dict(FlagSettings())] * len(flags)


def test_servers_are_asked_whether_they_are_well_where_they_answer() -> None:
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {
        "api",  # as its image says
        "otel-collector",
    }
    assert f"127.0.0.1:{WORKER_PORT}/healthz" in SERVICES["worker"]["healthcheck"]["test"][-1]
    assert SERVICES["api"]["ports"] == [f"127.0.0.1:{API_PORT}:{API_PORT}"]


def test_processes_get_the_time_that_they_take_to_end() -> None:
    for name, grace in (("api", API_GRACE), ("worker", WORKER_GRACE)):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= grace + 10


def test_prometheus_alone_may_read_the_metrics() -> None:
    address = ip_address(SERVICES["prometheus"]["networks"]["default"]["ipv4_address"])
    (pool,) = COMPOSE["networks"]["default"]["ipam"]["config"]
    assert address in ip_network(pool["subnet"])
    assert IPv4Network(pool["ip_range"]).subnet_of(IPv4Network(pool["subnet"]))
    assert address not in ip_network(pool["ip_range"])  # which the others have theirs from
    for name in ("api", "worker"):
        allowed = ip_network(SERVICES[name]["environment"]["SESSIONGATE_METRICS_ALLOW"])
        assert (allowed.num_addresses, allowed[0]) == (1, address)
    (prometheus,) = documents(DEPLOY / "prometheus/prometheus.yml")
    targets = {
        target
        for job in prometheus["scrape_configs"]
        for scraped in job["static_configs"]
        for target in scraped["targets"]
    }
    assert {f"api:{API_PORT}", f"worker:{WORKER_PORT}"} <= targets
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]


def test_nobody_gets_a_part_of_monitoring_that_does_not_work() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert {name for name, given in profiles.items() if given == ["monitoring"]} == {
        "prometheus",
        "alertmanager",
        "grafana",
    }
    # Without an address to send traces on to, it ends: whoever has none does not start it.
    assert profiles["otel-collector"] == ["tracing"]
    # An empty one would be taken for none, and admin's password be admin.
    assert SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "${GRAFANA_PASSWORD:?}"


def test_alertmanager_finds_its_tokens() -> None:
    (alertmanager,) = documents(DEPLOY / "alertmanager/alertmanager.yml")
    credentials = {
        webhook["http_config"]["authorization"]["credentials_file"]
        for receiver in alertmanager["receivers"]
        for webhook in receiver["webhook_configs"]
    }
    given = SERVICES["alertmanager"]["secrets"]
    assert {secret["target"] for secret in given} == credentials
    assert {secret["source"] for secret in given} == COMPOSE["secrets"].keys()


def test_the_collector_uses_what_it_declares_and_nothing_else() -> None:
    service = COLLECTOR["service"]
    assert set(service["extensions"]) == COLLECTOR["extensions"].keys()
    for kind in ("receivers", "processors", "exporters"):
        used = set(chain.from_iterable(pipeline[kind] for pipeline in service["pipelines"].values()))
        assert used == COLLECTOR[kind].keys()
    # What is sampled before it is batched is sampled by whole traces.
    processors = service["pipelines"]["traces"]["processors"]
    assert processors == ["memory_limiter", "tail_sampling", "batch"]
    read = {name for text in texts(COLLECTOR) for name in re.findall(r"\$\{env:(\w+)\}", text)}
    assert read == SERVICES["otel-collector"]["environment"].keys()


def test_the_collector_keeps_errors_and_as_much_else_as_the_services_would() -> None:
    policies = {policy["type"]: policy for policy in COLLECTOR["processors"]["tail_sampling"]["policies"]}
    assert policies["status_code"]["status_code"]["status_codes"] == ["ERROR"]
    share = policies["probabilistic"]["probabilistic"]["sampling_percentage"]
    assert share / 100 == float(dotenv_values(EXAMPLE)["OTEL_TRACES_SAMPLER_ARG"] or 0)
    assert len(policies) == 2
