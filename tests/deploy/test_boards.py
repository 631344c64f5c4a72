"""The boards say what they show, and are whole as Grafana reads them."""

import re
from collections import Counter
from itertools import chain, combinations
from typing import Any

import pytest
import yaml

from deploy.generate.__main__ import ROOT
from deploy.generate.boards.panels import COLUMNS
from deploy.generate.boards.runbooks import INDEX, SITE
from tests.deploy.generated import BOARDS, RULES, Document, panels

PROVISIONING = ROOT / "deploy/grafana/provisioning"
every_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)


def overlap(one: Document, other: Document) -> bool:
    a, b = one["gridPos"], other["gridPos"]
    return bool(
        a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"] and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]
    )


@every_board
def test_every_panel_says_what_it_shows_and_in_which_unit(board: Document) -> None:
    for panel in panels(board):
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    titles = Counter((panel["type"], panel["title"]) for panel in board["panels"])
    assert [title for title, times in titles.items() if times > 1] == []


@every_board
def test_every_query_asks_the_chosen_prometheus(board: Document) -> None:
    asked = [*panels(board), *board["annotations"]["list"]]
    asked += [target for panel in panels(board) for target in panel["targets"]]
    asked += [each for each in board["templating"]["list"] if each["type"] == "query"]
    sources = {(each["datasource"]["type"], each["datasource"]["uid"]) for each in asked}
    assert sources == {("prometheus", "${datasource}")}
    for panel in panels(board):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters, panel["title"]
        assert len(set(letters)) == len(letters), panel["title"]


@every_board
def test_panels_lie_side_by_side_within_the_grid(board: Document) -> None:
    for panel in board["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= COLUMNS, panel["title"]
    assert [(a["title"], b["title"]) for a, b in combinations(board["panels"], 2) if overlap(a, b)] == []


@every_board
def test_panels_have_numbers_of_their_own(board: Document) -> None:
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)


@every_board
def test_every_variable_that_is_used_can_be_chosen(board: Document) -> None:
    declared = {each["name"] for each in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", " ".join(strings(board))))
    assert used == declared


@every_board
def test_every_board_leads_to_the_others_and_to_the_runbooks(board: Document) -> None:
    boards, runbooks = board["links"]
    assert (boards["type"], boards["tags"]) == ("dashboards", board["tags"])
    assert runbooks["url"] == INDEX
    assert board["schemaVersion"] >= 36  # The first in which a source is named by type and uid.


def test_every_alert_can_be_looked_at_beside_its_runbook() -> None:
    shown = {
        (word, link["url"])
        for board in BOARDS.values()
        for panel in panels(board)
        for target in panel["targets"]
        for word in re.findall(r"\w+", re.sub(r"_(bucket|sum|count)\b", "", target["expr"]) + target["expr"])
        for link in panel["links"]
    }
    alerts = [rule for rule in chain(*RULES.values()) if "alert" in rule]
    pages = {rule["alert"]: rule["annotations"]["runbook"].removeprefix("docs/") for rule in alerts}
    metrics = {rule["alert"]: rule["annotations"]["metric"] for rule in alerts}
    assert [alert for alert in pages if (metrics[alert], f"{SITE}/{pages[alert]}") not in shown] == []


def test_boards_have_names_of_their_own() -> None:
    for key in ("uid", "title"):
        assert len({board[key] for board in BOARDS.values()}) == len(BOARDS)
    assert all(8 <= len(board["uid"]) <= 40 for board in BOARDS.values())


def test_grafana_finds_prometheus_and_the_boards() -> None:
    [source] = yaml.safe_load((PROVISIONING / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    scraping = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scraping["scrape_interval"]
    [provider] = yaml.safe_load((PROVISIONING / "dashboards/sessiongate.yaml").read_text())["providers"]
    assert provider["type"] == "file"


def strings(value: Any) -> list[str]:
    """All texts in a document."""
    match value:
        case str():
            return [value]
        case list():
            return [text for each in value for text in strings(each)]
        case dict():
            return [text for each in value.values() for text in strings(each)]
    return []
