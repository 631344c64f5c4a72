"""Runbooks: each alert has one, each says the same things, and whatever it tells to type exists."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command, get_group

from deploy.generate.__main__ import ROOT
from deploy.generate.alerts import ALERTS
from deploy.generate.objectives import OBJECTIVES
from libs.domain.catalogue import CATALOGUE
from libs.domain.log_events import LOG_EVENTS
from libs.observability.catalogue import OWN
from services.api.settings import ApiSettings
from services.cli.main import COMMANDS
from services.worker.settings import WorkerSettings
from tests.deploy.files import documents

RUNBOOKS = ROOT / "docs/runbooks"
PAGES = sorted(RUNBOOKS.glob("*.md"))
PROCEDURES = {"README.md", "recovery.md", "rollout-and-rollback.md"}
PARTS = ["What it means", "What people notice", "Look", "Mend", "Over when"]

OF_OTHERS = {"alertmanager_notifications_failed_total", "process_cpu_seconds_total"}
"""Metrics of Alertmanager, and of the client library."""

NAMED = {
    (alert.name, alert.runbook)
    for alerts in (*ALERTS.values(), *(objective.alerts() for objective in OBJECTIVES))
    for alert in alerts
}


def test_the_index_says_of_every_alert_on_which_page_it_is() -> None:
    rows = re.findall(r"^\| \[.*\]\((.*)\) \| (.*) \|$", (RUNBOOKS / "README.md").read_text(), re.MULTILINE)
    rows += re.findall(r"^\* \[.*\]\((.*)\): .*; (.*)\.$", (RUNBOOKS / "README.md").read_text(), re.MULTILINE)
    listed = {
        (name, f"docs/runbooks/{page}") for page, alerts in rows for name in re.findall(r"`([A-Z][A-Za-z]+)`", alerts)
    }
    assert listed == NAMED


def test_every_page_is_named_by_the_index_and_says_which_alerts_lead_to_it() -> None:
    index = set(re.findall(r"\]\((.*?\.md)\)", (RUNBOOKS / "README.md").read_text()))
    assert index == {page.name for page in PAGES} - {"README.md"}
    for page in PAGES:
        if page.name != "README.md":
            head = page.read_text().partition("\n## ")[0]
            alerts = {name for name, runbook in NAMED if runbook == f"docs/runbooks/{page.name}"}
            assert set(re.findall(r"`([A-Z][A-Za-z]+)`", head)) == alerts, page.name


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in PROCEDURES], ids=lambda page: page.stem)
def test_a_page_says_what_it_means_what_to_look_at_how_to_mend_it_and_when_it_is_over(page: Path) -> None:
    assert re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE) == PARTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_whatever_a_page_refers_to_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for heading in re.findall(r"operating\.md#([a-z-]+)", text):
        headings = re.findall(r"^#+ (.*)$", (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
        assert heading in {each.lower().replace(" ", "-") for each in headings}
    for setting in re.findall(r"SESSIONGATE_([A-Z_]+)", text):
        assert setting.lower() in {*ApiSettings.model_fields, *WorkerSettings.model_fields}
    metrics = {spec.name for spec in (*OWN, *CATALOGUE)} | OF_OTHERS
    assert set(re.findall(r"\b[a-z_]+_total\b", text)) <= metrics


# Commands


def typed(text: str) -> Iterator[list[str]]:
    """The words of each line of a code block, and of inline code that begins with a program."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    programs = r"`((?:sessiongate|docker|kubectl) [^`]+)`"
    inline = re.findall(programs, re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in (*lines, *inline):
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


def commands(text: str) -> Iterator[list[str]]:
    """The words after `sessiongate` wherever somebody types it, on this machine or in a container."""
    for words in typed(text):
        if words[0] in {"sessiongate", "docker", "kubectl"} and "sessiongate" in words:
            yield words[words.index("sessiongate") + 1 :]


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command of the program that these words call, and its arguments. Raises KeyError when there is none."""
    module, _, attribute = COMMANDS[words[0]].partition(":")
    found, rest = getattr(import_module(module), attribute), words[1:]
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer()
        found.command()(function)
        return get_command(found), rest
    return get_group(found).commands[rest[0]], rest[1:]


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_runbook_can_be_typed_as_it_stands(page: Path) -> None:
    for words in commands(page.read_text()):
        command, arguments = command_of(words)
        context = command.make_context(" ".join(words), list(arguments))
        assert context.params.get("event") in {None, *LOG_EVENTS}


DEPLOYING = ROOT / "deploy/README.md"


@pytest.mark.parametrize("page", [*PAGES, DEPLOYING], ids=lambda page: page.stem)
def test_every_container_and_every_address_of_this_machine_is_one_that_the_deployments_have(page: Path) -> None:
    (compose,) = documents(ROOT / "deploy/compose.yaml")
    published = {port.split(":")[1] for each in compose["services"].values() for port in each.get("ports", ())}
    manifests = [each for path in (ROOT / "deploy/kubernetes/base").glob("*.yaml") for each in documents(path)]
    pods = {each["metadata"]["name"] for each in manifests if each["kind"] in {"Deployment", "Job"}}
    assert set(re.findall(r"127\.0\.0\.1:(\d+)", page.read_text())) <= published
    for words in typed(page.read_text()):
        if words[:2] == ["docker", "compose"]:
            assert words[2:4] == ["--file", "deploy/compose.yaml"]
            verb, *rest = takewhile(lambda word: word not in {"|", ">", "<"}, words[4:])
            named = [word for word in rest if not word.startswith("-")]
            assert set(named[:1] if verb in {"exec", "run"} else named) <= compose["services"].keys()
        if words[0] == "kubectl":
            assert {word.partition("/")[2] for word in words if re.match("(deploy|job)/[^/]+$", word)} <= pods


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), DEPLOYING], ids=lambda page: page.stem)
def test_every_command_that_is_described_exists_with_its_options(page: Path) -> None:
    for words in commands(page.read_text()):
        command, arguments = command_of(words)
        named = {option for word in arguments for option in re.findall(r"--[a-z-]+", word)}
        assert named <= options_of(command), words


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    assert list(commands("Do `sessiongate audit`.\n```sh\nsessiongate explain 1 # why\n```\n")) == [
        ["explain", "1"],
        ["audit"],
    ]
    for words in (["audits"], ["outbox", "undo"]):
        with pytest.raises(KeyError):
            command_of(words)
    command, arguments = command_of(["outbox", "dead", "--forever"])
    with pytest.raises(Exception, match="--forever"):
        command.make_context("outbox dead", arguments)
