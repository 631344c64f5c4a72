"""deploy/kubernetes, as far as it can be judged without a cluster: each manifest by its schema, and all together."""

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from dotenv import dotenv_values
from pydantic import ValidationError

from libs.domain.catalogue import CATALOGUE
from libs.domain.sealing import new_key
from libs.domain.settings import DatabaseSettings, FlagSettings, variable
from services.api.main import GRACE_SECONDS as API_GRACE
from services.api.settings import ApiSettings
from services.worker.main import GRACE_SECONDS as WORKER_GRACE
from services.worker.settings import WorkerSettings
from tests.deploy.files import API_PORT, DEPLOY, WORKER_PORT, documents, faults, is_pinned, known_variables
from tests.deploy.monitoring import installed

KUBERNETES = DEPLOY / "kubernetes"
VERSIONS = ("1.31", "1.34")
"""The releases of Kubernetes that the manifests are for: the oldest, and the newest that was looked at."""
KUSTOMIZATIONS = {"Kustomization", "Component"}
OTHERS = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
"""Kinds that Kubernetes itself does not have."""

Manifest = dict[str, Any]


GENERATED = {"ConfigMap": ("configMapGenerator", "data"), "Secret": ("secretGenerator", "stringData")}
"""Of what kustomize makes by itself: what tells it to, and where the values are."""
HASH = "-[bcdfghkmt2456789]{10}$"
"""The end that it gives to their names: sixteen characters that make no words."""


def resources(folder: Path) -> list[Manifest]:
    """What a kustomization is made of, unpatched, and by its names without hashes."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    made: list[Manifest] = []
    for name in (*kustomization.get("resources", ()), *kustomization.get("components", ())):
        path = folder / name
        made += resources(path) if path.is_dir() else documents(path)
    for kind, (generators, values) in GENERATED.items():
        for generator in kustomization.get(generators, ()):
            named = {"apiVersion": "v1", "kind": kind, "metadata": {"name": generator["name"]}}
            given = {name: value for path in generator["envs"] for name, value in dotenv_values(folder / path).items()}
            if generator.get("behavior") == "merge":
                (merged,) = [each for each in made if named.items() <= each.items()]
                merged[values] |= given
            else:
                made.append(named | {values: given})
    return made


MANIFESTS = resources(KUBERNETES / "example")


def of_kind(*kinds: str) -> list[Manifest]:
    return [manifest for manifest in MANIFESTS if manifest["kind"] in kinds]


PODS = {manifest["metadata"]["name"]: manifest["spec"]["template"] for manifest in of_kind("Deployment", "Job")}
CONTAINERS = {name: pod["spec"]["containers"][0] for name, pod in PODS.items()}


def test_there_is_one_of_each() -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in MANIFESTS]
    assert len(set(names)) == len(names)
    assert PODS.keys() == {"sessiongate-api", "sessiongate-worker", "sessiongate-migrate"}
    assert [pod["spec"]["containers"][1:] for pod in PODS.values()] == [[]] * len(PODS)


def test_every_file_belongs_to_a_kustomization() -> None:
    named = set()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        (kustomization,) = documents(path)
        patches = [patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch]
        generators = [each for key, _ in GENERATED.values() for each in kustomization.get(key, ())]
        envs = [env for generator in generators for env in generator["envs"]]
        for name in (*kustomization.get("resources", ()), *kustomization.get("components", ()), *patches, *envs):
            named.add((path.parent / name).resolve())
    assert [path for path in named if not path.exists()] == []
    files = {path for path in KUBERNETES.rglob("*") if path.is_file() and path.name != "kustomization.yaml"}
    assert files == {path for path in named if path.is_file()}


def test_kustomize_makes_of_the_files_what_is_tested_here() -> None:
    command = (installed("kubectl"), "kustomize", KUBERNETES / "example")
    made = list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout))

    def name(manifest: Manifest) -> tuple[str, str]:
        return manifest["kind"], re.sub(HASH, "", manifest["metadata"]["name"])

    assert sorted(map(name, made)) == sorted(map(name, MANIFESTS))
    (settings,) = [manifest["data"] for manifest in made if manifest["kind"] == "ConfigMap"]
    assert settings == stored("ConfigMap", "sessiongate")
    for each in made:
        if each["kind"] in {"Deployment", "Job"}:
            (container,) = each["spec"]["template"]["spec"]["containers"]
            sources = {reference["name"] for source in container["envFrom"] for reference in source.values()}
            assert sources <= {manifest["metadata"]["name"] for manifest in made}
            # So that the pods are replaced when a value changes.
            assert all(re.search(HASH, source) for source in sources)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_understands_every_manifest(version: str) -> None:
    for manifest in MANIFESTS:
        if manifest["kind"] not in OTHERS:
            assert kubernetes_validate.validate(manifest, version, strict=True) == version
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(MANIFESTS[0] | {"specs": {}}, version, strict=True)


def test_the_operators_understand_theirs() -> None:
    assert {manifest["kind"] for manifest in MANIFESTS} >= OTHERS
    for manifest in of_kind(*OTHERS):
        assert faults(manifest, manifest["kind"].lower()) == []
        assert faults(manifest | {"specs": {}}, manifest["kind"].lower()) != []


def test_every_image_is_pinned() -> None:
    assert {container["image"] for container in CONTAINERS.values()} == {"sessiongate:0.1.0"}
    (kustomization,) = documents(KUBERNETES / "example/kustomization.yaml")
    for image in kustomization["images"]:
        assert is_pinned(f"{image['newName']}:{image['newTag']}")


@pytest.mark.parametrize("name", PODS)
def test_pods_may_do_nothing_that_they_need_not(name: str) -> None:
    pod, container = PODS[name]["spec"], CONTAINERS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]


def stored(kind: str, name: str) -> dict[str, str]:
    """What a ConfigMap or a Secret of the example holds."""
    (manifest,) = [each for each in of_kind(kind) if each["metadata"]["name"] == name]
    held: dict[str, str] = manifest[GENERATED[kind][1]]
    return held


def environment(container: Manifest) -> dict[str, str]:
    """The environment of a container, as Kubernetes makes it."""
    made: dict[str, str] = {}
    for source in container["envFrom"]:
        ((reference, named),) = source.items()
        made |= stored("ConfigMap" if reference == "configMapRef" else "Secret", named["name"])
    for each in container.get("env", ()):
        if "valueFrom" in each:
            reference = each["valueFrom"]["secretKeyRef"]
            made[each["name"]] = stored("Secret", reference["name"])[reference["key"]]
        else:
            made[each["name"]] = re.sub(r"\$\((\w+)\)", lambda match: made[match[1]], each["value"])
    return made


def filled_in(key: str, value: str) -> str:
    """A variable of the example, once somebody has put a secret where one has to be."""
    if key.endswith("KEYS"):
        return new_key("2030")
    return f"{value}word" if key.endswith("BASIC_AUTH") else value.replace("CHANGE-ME", "s" * 32)


SETTINGS_OF: dict[str, tuple[Any, ...]] = {
    "sessiongate-api": (ApiSettings, FlagSettings),
    "sessiongate-worker": (WorkerSettings, FlagSettings),
    "sessiongate-migrate": (DatabaseSettings,),
}


@pytest.mark.parametrize("name", PODS)
def test_every_process_starts_with_what_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = environment(CONTAINERS[name])
    assert given.keys() - known_variables() <= {"METRICS_USER", "METRICS_PASSWORD"}
    for key, value in given.items():
        monkeypatch.setenv(key, filled_in(key, value))
    for settings in SETTINGS_OF[name]:
        settings(_env_file=None)
    assert ("sessiongate_owner" in given["SESSIONGATE_DATABASE_URL"]) == (name == "sessiongate-migrate")
    flags = {"ENFORCE_SESSION_GATED_CHAT", "ENFORCE_SESSION_GATED_BILLING"}
    flags |= {"ALLOW_LEGACY_APPOINTMENT_CHAT", "DISABLE_LEGACY_APPOINTMENT_TRIGGERS"}
    assert name == "sessiongate-migrate" or flags <= given.keys()


@pytest.mark.parametrize(
    "forgotten", ["SESSIONGATE_FIELD_KEYS", "SESSIONGATE_ALERTS_TOKEN", "SESSIONGATE_METRICS_BASIC_AUTH"]
)
def test_the_api_refuses_to_start_with_a_secret_as_the_example_has_it(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment(CONTAINERS["sessiongate-api"]).items():
        monkeypatch.setenv(key, value if key == forgotten else filled_in(key, value))
    with pytest.raises(ValidationError) as refused:
        ApiSettings(_env_file=None)
    assert [variable(ApiSettings, str(fault["loc"][0])) for fault in refused.value.errors()] == [forgotten]


def test_no_address_of_the_example_has_a_password_that_a_server_would_accept() -> None:
    addresses = [value for each in of_kind("Secret") for value in each["stringData"].values() if "://" in value]
    assert [address for address in addresses if ":CHANGE-ME@" not in address] == []
    assert len(addresses) == 3


def test_the_connections_of_all_processes_are_fewer_than_postgresql_admits() -> None:
    (scaler,), (scaled,) = of_kind("HorizontalPodAutoscaler"), of_kind("ScaledObject")
    # One more of each during a rollout: of the API as its strategy says, of the workers a quarter of up to four.
    api, workers = scaler["spec"]["maxReplicas"] + 1, scaled["spec"]["maxReplicaCount"] + 1
    assert workers <= 5
    of_each = 2 * int(stored("ConfigMap", "sessiongate")["SESSIONGATE_POOL_SIZE"]) + 1
    assert (api + workers) * of_each + 1 == 91  # as settings.env says; 3 of the 100 are reserved for superusers


@pytest.mark.parametrize(
    ("name", "port", "grace"),
    [("sessiongate-api", API_PORT, API_GRACE), ("sessiongate-worker", WORKER_PORT, WORKER_GRACE)],
)
def test_processes_are_asked_where_they_answer_and_get_the_time_to_end(name: str, port: int, grace: float) -> None:
    container = CONTAINERS[name]
    (declared,) = container["ports"]
    assert declared["containerPort"] == port
    probes = {key: probe["httpGet"] for key, probe in container.items() if key.endswith("Probe")}
    assert {"startupProbe", "livenessProbe"} <= probes.keys()
    assert {probe["port"] for probe in probes.values()} == {declared["name"]}
    paths = {key: probe["path"] for key, probe in probes.items()}
    assert paths.pop("readinessProbe", "/readyz") == "/readyz"
    assert set(paths.values()) == {"/healthz"}
    (service,) = [each for each in of_kind("Service") if each["metadata"]["name"] == name]
    (served,) = service["spec"]["ports"]
    assert (served["port"], served["targetPort"]) == (port, declared["name"])
    before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert PODS[name]["spec"]["terminationGracePeriodSeconds"] >= before + grace + 10


def test_whatever_selects_pods_selects_some() -> None:
    part_of = {"app.kubernetes.io/part-of": "sessiongate"}  # which the kustomization gives to all
    labels = {name: pod["metadata"]["labels"] | part_of for name, pod in PODS.items()}
    selectors = [manifest["spec"]["selector"] for manifest in of_kind("Service")]
    for manifest in of_kind("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
        selectors.append(manifest["spec"]["selector"]["matchLabels"])
    selectors += [manifest["spec"]["podSelector"]["matchLabels"] for manifest in of_kind("NetworkPolicy")]
    for pod in PODS.values():
        spread = pod["spec"].get("topologySpreadConstraints", ())
        selectors += [constraint["labelSelector"]["matchLabels"] for constraint in spread]
    assert len(selectors) > 15
    for selector in selectors:
        assert any(selector.items() <= of_pod.items() for of_pod in labels.values()), selector
    for manifest in of_kind("HorizontalPodAutoscaler", "ScaledObject"):
        assert manifest["spec"]["scaleTargetRef"]["name"] in PODS


def test_the_network_is_closed_but_for_what_processes_need() -> None:
    policies = {manifest["metadata"]["name"]: manifest["spec"] for manifest in of_kind("NetworkPolicy")}
    assert policies["sessiongate-nothing"].keys() == {"podSelector", "policyTypes"}
    let_in = {
        name: {port["port"] for rule in policy.get("ingress", ()) for port in rule["ports"]}
        for name, policy in policies.items()
        if "ingress" in policy
    }
    assert let_in == {name: {CONTAINERS[name]["ports"][0]["name"]} for name in let_in}
    assert let_in.keys() == {"sessiongate-api", "sessiongate-worker"}
    assert all(rule["from"] for policy in policies.values() for rule in policy.get("ingress", ()))
    (names,) = [rule["to"] for rule in policies["sessiongate-servers"]["egress"] if "to" in rule]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in names  # in no namespace, and forbidden to webhooks


def test_workers_are_scaled_by_metrics_that_there_are() -> None:
    (scaled,) = of_kind("ScaledObject")
    known = {spec.name: {label.name: label.values for label in spec.labels} for spec in CATALOGUE}
    for trigger in scaled["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        name, label, value = re.fullmatch(r'max\((\w+)(?:\{(\w+)="(\w+)"\})?\)', query).groups()  # type: ignore[union-attr]
        assert name in known
        assert label is None or value in (known[name][label] or ())
    deployment = next(each for each in of_kind("Deployment") if each["metadata"]["name"] == "sessiongate-worker")
    assert scaled["spec"]["minReplicaCount"] == scaled["spec"]["fallback"]["replicas"] == deployment["spec"]["replicas"]


def test_metrics_are_scraped_from_ports_and_with_secrets_that_there_are() -> None:
    services = {each["metadata"]["name"]: each["spec"]["ports"] for each in of_kind("Service")}
    (prometheus,) = documents(DEPLOY / "prometheus/prometheus.yml")
    jobs = {job["job_name"]: job for job in prometheus["scrape_configs"]}
    for monitor in of_kind("ServiceMonitor"):
        name, spec = monitor["metadata"]["name"], monitor["spec"]
        (endpoint,) = spec["endpoints"]
        assert endpoint["port"] in {port["name"] for port in services[name]}
        for part in endpoint["basicAuth"].values():
            assert part["key"] in stored("Secret", part["name"])
        fences = (spec["sampleLimit"], spec["labelValueLengthLimit"])
        assert fences == (jobs[name]["sample_limit"], jobs[name]["label_value_length_limit"])
