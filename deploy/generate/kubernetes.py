"""deploy/kubernetes/prometheus-operator: the rules, as the Prometheus operator takes them."""

from typing import Any, Final

from deploy.generate.documents import as_yaml
from deploy.generate.prometheus import groups
from libs.observability import rules

RULES: Final[dict[str, Any]] = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PrometheusRule",
    "metadata": {"name": "sessiongate", "labels": {"app.kubernetes.io/part-of": "sessiongate"}},
    "spec": rules.document(groups()),
}


def files() -> dict[str, str]:
    return {"deploy/kubernetes/prometheus-operator/rules.yaml": as_yaml(RULES, "deploy/generate/kubernetes.py")}
