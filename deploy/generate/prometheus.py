"""deploy/prometheus: whom to scrape, and the rules."""

from typing import Any, Final

from deploy.generate.alerts import ALERTS
from deploy.generate.documents import as_yaml
from deploy.generate.objectives import OBJECTIVES
from libs.domain.catalogue import CATALOGUE
from libs.observability import rules
from libs.observability.catalogue import OWN
from libs.observability.rules import Group
from services.api.settings import ApiSettings
from services.worker.settings import WorkerSettings

# What the client library and Prometheus itself add to those of the catalogue.
_METRICS: Final = (
    *(spec.name for spec in (*OWN, *CATALOGUE)),
    *("build_info", "process_cpu_seconds_total", "process_resident_memory_bytes", "up"),
)


def _ours(*groups: Group) -> tuple[Group, ...]:
    return rules.scoped(groups, _METRICS, 'job=~"sessiongate-.*"')


RULES: Final = {
    "aliases": _ours(rules.aliases((*OWN, *CATALOGUE))),
    "objectives": _ours(*(group for objective in OBJECTIVES for group in objective.groups())),
    "alerts": _ours(*(Group(name, alerts) for name, alerts in ALERTS.items())),
}
"""The groups of each rule file."""

API: Final = f"api:{ApiSettings.model_fields['api_port'].default}"
WORKER: Final = f"worker:{WorkerSettings.model_fields['worker_metrics_port'].default}"
"""Where a service answers, by its name in deploy/compose.yaml."""


def _scrape(job: str, target: str, **more: Any) -> dict[str, Any]:
    return {"job_name": job, "static_configs": [{"targets": [target]}]} | more


# A label that ran away is an error of that target, and not the end of this server.
_FENCED: Final = {"sample_limit": 20_000, "label_value_length_limit": 200}

CONFIG: Final = {
    "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
    "rule_files": ["rules/*.yml"],
    "alerting": {"alertmanagers": [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]},
    "scrape_configs": [
        _scrape("sessiongate-api", API, **_FENCED),
        _scrape("sessiongate-worker", WORKER, **_FENCED),
        _scrape("prometheus", "localhost:9090"),
        _scrape("alertmanager", "alertmanager:9093"),
    ],
}


def files() -> dict[str, str]:
    source = "deploy/generate/prometheus.py"
    made = {"deploy/prometheus/prometheus.yml": as_yaml(CONFIG, source)}
    for name, groups in RULES.items():
        made[f"deploy/prometheus/rules/{name}.yml"] = as_yaml(rules.document(groups), source)
    return made


def groups() -> list[Group]:
    """All of them, for whoever installs rules by other means than files."""
    return [group for groups in RULES.values() for group in groups]
