"""deploy/alertmanager: who is told of what."""

from typing import Any, Final

from deploy.generate.documents import as_yaml
from deploy.generate.prometheus import API

TOKENS: Final = "/etc/alertmanager/secrets"
"""The folder of the bearer tokens, one file for each receiver."""


def _webhook(name: str, url: str) -> dict[str, Any]:
    credentials = {"type": "Bearer", "credentials_file": f"{TOKENS}/{name}"}
    sent = {"url": url, "send_resolved": True, "http_config": {"authorization": credentials}}
    return {"name": name, "webhook_configs": [sent]}


CONFIG: Final = {
    "route": {
        "receiver": "api",
        "group_by": ["alertname", "slo"],
        "group_wait": "10s",
        "group_interval": "1m",
        "repeat_interval": "4h",
        "routes": [
            {"matchers": ['severity="critical"'], "receiver": "oncall", "continue": True},
            {"receiver": "api"},
        ],
    },
    "inhibit_rules": [
        {
            "source_matchers": ['severity="critical"'],
            "target_matchers": ['severity="warning"'],
            "equal": ["alertname", "slo"],
        },
    ],
    "receivers": [
        _webhook("api", f"http://{API}/internal/alerts"),
        _webhook("oncall", "https://oncall.example.com/alerts"),
    ],
}


def files() -> dict[str, str]:
    return {"deploy/alertmanager/alertmanager.yml": as_yaml(CONFIG, "deploy/generate/alertmanager.py")}
