"""deploy/alertmanager: who is told of what."""

from typing import Any, Final

from deploy.generate.alerts import ALERTS
from deploy.generate.documents import as_yaml
from deploy.generate.prometheus import API

TOKENS: Final = "/etc/alertmanager/secrets"
"""The folder of the bearer tokens: `api`, and `oncall` for those who tell people."""

PEOPLE: Final = ("oncall", "team", "watchdog")
"""Receivers that reach somebody: whoever is on call, those who see to the rest in daytime, and a dead man's switch."""


def _webhook(name: str, url: str, file: str) -> dict[str, Any]:
    credentials = {"type": "Bearer", "credentials_file": f"{TOKENS}/{file}"}
    # The API accepts 2 MiB, which is some 2,000 alerts.
    sent = {"url": url, "send_resolved": True, "max_alerts": 1000, "http_config": {"authorization": credentials}}
    return {"name": name, "webhook_configs": [sent]}


def _inhibited(more: str, less: str) -> dict[str, Any]:
    return {
        "source_matchers": [f"alertname={more}"],
        "target_matchers": [f"alertname={less}"],
        "equal": ["namespace"],
    }


CONFIG: Final = {
    "route": {
        "receiver": "api",
        "group_by": ["alertname", "slo"],
        "group_wait": "10s",
        "group_interval": "1m",
        "repeat_interval": "4h",
        "routes": [
            # Whoever gets this one raises the alarm when it does not come.
            {"matchers": ['alertname="Watchdog"'], "receiver": "watchdog", "repeat_interval": "5m"},
            {"matchers": ['severity="critical"'], "receiver": "oncall", "continue": True},
            {"matchers": ['severity=~"high|warning"'], "receiver": "team", "continue": True},
            {"receiver": "api"},
        ],
    },
    "inhibit_rules": [
        {
            "source_matchers": ['severity="critical"'],
            "target_matchers": ['severity="warning"'],
            "equal": ["alertname", "slo", "namespace"],
        },
        *(
            _inhibited(alert.name, alert.supersedes)
            for alerts in ALERTS.values()
            for alert in alerts
            if alert.supersedes
        ),
    ],
    "receivers": [
        _webhook("api", f"http://{API}/internal/alerts", file="api"),
        *(_webhook(name, f"https://oncall.example.com/{name}", file="oncall") for name in PEOPLE),
    ],
}


def files() -> dict[str, str]:
    return {"deploy/alertmanager/alertmanager.yml": as_yaml(CONFIG, "deploy/generate/alertmanager.py")}
