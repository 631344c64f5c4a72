"""Log events as data, and that a line which is not like its event is noticed."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from libs.observability.events import event
from libs.observability.logging import get_logger
from libs.observability.testing import capture_logs
from tests import log_lines

GOOD = {
    "timestamp": "2030-01-01T00:00:00Z",
    "level": "error",
    "event": "cron_failed",
    "category": "error",
    "component": "worker",
    "module": "infra",
    "service": "x",
    "version": "0",
    "exception_type": "OSError",
    "task": None,
}


def test_an_event_has_a_name_like_the_others() -> None:
    for name in ("Done", "is done", "done_", ""):
        with pytest.raises(ValueError, match="snake_case"):
            event(name, "info")


def test_what_is_logged_as_an_error_is_of_that_category_unless_it_is_of_another() -> None:
    assert event("failed", "error").category == "error"
    assert event("failed", "error", category="security").category == "security"
    assert event("failed", "warning").category is None


def test_lines_get_the_category_of_their_event() -> None:
    log = get_logger("chat", "conversation")
    known = {each.name: each for each in (event("door_opened", "info", category="connection"), event("waited", "info"))}
    with capture_logs(events=known) as captured:
        for name in ("door_opened", "waited", "unheard_of"):
            log.info(name)
        assert [line.get("category") for line in captured.lines()] == ["connection", None, None]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"level": "critical"}, None),
        ({"event": "unheard_of"}, "registered"),
        ({"level": "warning"}, "severe"),
        ({"category": "security"}, "category"),
        ({"service": ...}, "lacks service"),
        ({"task": ...}, "lacks task"),
    ],
)
def test_a_line_unlike_its_event_is_noticed(tmp_path: Path, change: dict[str, Any], fault: str | None) -> None:
    log = tmp_path / "x.jsonl"
    line = {name: value for name, value in (GOOD | change).items() if value is not ...}
    log.write_bytes(orjson.dumps(GOOD) + b"\n" + orjson.dumps(line) + b"\n{cut off")
    if fault is None:
        log_lines.check(log)
    else:
        with pytest.raises(AssertionError, match=fault):
            log_lines.check(log)
