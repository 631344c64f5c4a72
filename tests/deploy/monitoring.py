"""Prometheus and Alertmanager for tests: with the generated files, but for where things are and how long they take."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import yaml

from tests.processes import free_port, until
from tests.running import client_of

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
SHORT: Final = "1s"
"""What all intervals and times to wait are here."""


def installed(program: str) -> str:
    """Where the program is; skips the test where it is not."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    client: httpx2.AsyncClient

    async def get(self, path: str, **parameters: str) -> Any:
        """The data that the HTTP API answers. Raises AssertionError with what it says when it refuses."""
        answer = (await self.client.get(f"/api/v1/{path}", params=parameters)).json()
        assert answer["status"] == "success", answer.get("error")
        return answer["data"]

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The answers of an expression as of now, each with its `metric` and `value`."""
        answers: list[dict[str, Any]] = (await self.get("query", query=expr))["result"]
        return answers

    async def rules(self) -> list[dict[str, Any]]:
        return [rule for group in (await self.get("rules"))["groups"] for rule in group["rules"]]

    async def has_evaluated_every_rule(self) -> bool:
        rules = await self.rules()
        return bool(rules) and all(rule["health"] != "unknown" for rule in rules)


@asynccontextmanager
async def running_prometheus(folder: Path, addresses: Mapping[str, str]) -> AsyncIterator[Prometheus]:
    """Scrapes at `addresses`, which the generated configuration knows by other names. Alerts wait for nothing."""
    folder.mkdir()
    (folder / "rules").mkdir()
    for path in (DEPLOY / "prometheus/rules").iterdir():
        document = yaml.safe_load(path.read_text())
        for group in document["groups"]:
            group.pop("interval", None)
            for rule in group["rules"]:
                rule.pop("for", None)
        (folder / "rules" / path.name).write_text(yaml.safe_dump(document))
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": SHORT, "evaluation_interval": SHORT}
    port = free_port()
    known = dict(addresses) | {"localhost:9090": f"127.0.0.1:{port}"}
    for each in (*config["scrape_configs"], *config["alerting"]["alertmanagers"]):
        for targets in each["static_configs"]:
            targets["targets"] = [known[target] for target in targets["targets"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = (
        installed("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        f"--rules.alert.resend-delay={SHORT}",
        "--enable-feature=exemplar-storage",
    )
    async with _running(command, folder, port) as client:
        yield Prometheus(client)


@asynccontextmanager
async def running_alertmanager(folder: Path, urls: Mapping[str, str], tokens: Mapping[str, str]) -> AsyncIterator[str]:
    """Tells receivers at `urls`, by their names, with `tokens`, by the names of their files; yields the address."""
    folder.mkdir()
    config = yaml.safe_load((DEPLOY / "alertmanager/alertmanager.yml").read_text())
    config["route"] |= {"group_wait": SHORT, "group_interval": SHORT}
    for name, token in tokens.items():
        (folder / name).write_text(token)
    for receiver in config["receivers"]:
        for webhook in receiver["webhook_configs"]:
            webhook["url"] = urls[receiver["name"]]
            authorization = webhook["http_config"]["authorization"]
            authorization["credentials_file"] = str(folder / Path(authorization["credentials_file"]).name)
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = (
        installed("prometheus-alertmanager"),
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    )
    async with _running(command, folder, port):
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def _running(command: tuple[str, ...], folder: Path, port: int) -> AsyncIterator[httpx2.AsyncClient]:
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)

    async def is_ready() -> bool:
        assert process.returncode is None, (folder / "log").read_text()
        try:
            return (await client.get("/-/ready")).status_code == 200
        except httpx2.TransportError:
            return False

    try:
        async with client_of(f"http://127.0.0.1:{port}") as client:
            await until(is_ready)
            yield client
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
