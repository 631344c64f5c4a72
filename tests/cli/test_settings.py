"""`sessiongate settings`."""

import json
from pathlib import Path

from tests.cli.conftest import sessiongate


def test_every_setting_is_listed_with_value_and_origin_but_no_secret(tmp_path: Path) -> None:
    dotenv = ("SESSIONGATE_POOL_SIZE=3", "SESSIONGATE_LOG_LEVEL=DEBUG", "ENFORCE_SESSION_GATED_CHAT=true")
    (tmp_path / ".env").write_text("\n".join(dotenv))
    env = {
        "SESSIONGATE_POOL_SIZE": "4",
        "SESSIONGATE_JWT_SECRET": "swordfish",
        "SESSIONGATE_DATABASE_URL": "postgresql://me:sword:fish@host/name?password=swordfish&host=/tmp",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=swordfish",
    }
    listed = sessiongate(tmp_path, "settings", "--json", env=env)
    found = {setting["name"]: (setting["value"], setting["origin"]) for setting in json.loads(listed.stdout)}
    assert found["SESSIONGATE_POOL_SIZE"] == ("4", "environment")
    assert found["SESSIONGATE_LOG_LEVEL"] == ("DEBUG", ".env")
    assert found["ENFORCE_SESSION_GATED_CHAT"] == ("true", ".env")
    assert found["ENFORCE_SESSION_GATED_BILLING"] == ("False", "default")
    assert found["SESSIONGATE_API_PORT"] == ("8000", "default")
    assert found["SESSIONGATE_WORKER_METRICS_PORT"] == ("9101", "default")
    assert found["SESSIONGATE_REDIS_URL"] == (None, "default")
    assert found["SESSIONGATE_JWT_SECRET"] == ("********", "environment")
    assert found["OTEL_TRACES_SAMPLER_ARG"] == ("0.1", "default")
    for output in (listed.stdout, sessiongate(tmp_path, "settings", env=env).stdout):
        assert "fish" not in output
    assert all(setting["description"].endswith(".") for setting in json.loads(listed.stdout))
