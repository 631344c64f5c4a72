"""The generated files as Grafana and Prometheus read them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from deploy.generate.__main__ import ROOT

Document = dict[str, Any]

BOARDS: Final[dict[str, Document]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
}
RULES: Final[dict[str, list[Document]]] = {
    path.stem: [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    for path in sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
}

# As Grafana has them once a board is opened, all instances are shown, and scrapes are 15 seconds apart.
_VARIABLES: Final = {"$__rate_interval": "1m", "$__range": "6h", "$job": ".*", "$instance": ".*"}


@dataclass(frozen=True)
class Expression:
    """An expression, where it stands, and the labels that are quoted beside it."""

    place: str
    text: str
    quoted: frozenset[str]
    may_be_empty: bool

    def __str__(self) -> str:
        return self.place


def panels(board: Document) -> list[Document]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def substituted(expression: str) -> str:
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def of_boards() -> Iterator[Expression]:
    for name, board in BOARDS.items():
        for panel in panels(board):
            may_be_empty = "noValue" in panel["fieldConfig"]["defaults"]
            for target in panel["targets"]:
                quoted = frozenset(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
                text = substituted(target["expr"])
                place = f"{name}: {panel['title']} {target['refId']}"
                yield Expression(place, text, quoted, may_be_empty)
        for each in board["templating"]["list"]:
            if found := re.fullmatch(r"label_values\((.+), (\w+)\)", each["query"]):
                place = f"{name}: variable {each['name']}"
                yield Expression(place, substituted(found[1]), frozenset({found[2]}), may_be_empty=False)
        for each in board["annotations"]["list"]:
            quoted = frozenset(re.findall(r"{{(\w+)}}", each["textFormat"]))
            yield Expression(f"{name}: annotation {each['name']}", substituted(each["expr"]), quoted, may_be_empty=True)


def of_rules() -> Iterator[Expression]:
    for name, rules in RULES.items():
        for number, rule in enumerate(rules):
            texts = " ".join(rule.get("annotations", {}).values())
            quoted = frozenset(re.findall(r"\$labels\.(\w+)", texts)) - rule.get("labels", {}).keys()
            place = f"{name}: {rule.get('alert') or rule['record']} {number}"
            yield Expression(place, rule["expr"], quoted, may_be_empty=True)
