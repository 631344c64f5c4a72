"""Lines that the program logged in tests: each is of a registered event, and has all of its fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from libs.domain.log_events import LOG_EVENTS
from libs.observability.events import EVERY_LINE, SEVERITY


def lines_of(log: Path) -> list[dict[str, Any]]:
    """The lines of a log file. One that a kill cut off does not count."""
    whole = log.read_bytes().rpartition(b"\n")[0] if log.exists() else b""
    return [orjson.loads(line) for line in whole.splitlines()]


def faults_of(line: Mapping[str, Any]) -> list[str]:
    """What is wrong with a line."""
    event = LOG_EVENTS.get(line["event"])
    if event is None:
        return ["is of no registered event"]
    faults = [f"lacks {name}" for name in (*EVERY_LINE, *event.required) if name not in line]
    if line.get("category") != event.category:
        faults.append(f"is not of the category {event.category}")
    if SEVERITY[line["level"]] < SEVERITY[event.level]:
        faults.append(f"is less severe than {event.level}")
    return faults


def check(log: Path) -> None:
    """Fails on a line of an unknown event, and on one that lacks a field."""
    wrong = [(line, faults) for line in lines_of(log) if (faults := faults_of(line))]
    assert wrong == [], wrong
