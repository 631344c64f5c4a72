"""What every log line says, what it never says, and what happens when lines come faster than disks."""

import logging
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from libs.observability import logging as logs
from libs.observability.context import bind
from libs.observability.logging import Logger, LogSettings, configure_logging, get_logger
from libs.observability.registry import Metrics
from libs.observability.testing import CapturedLogs, capture_logs
from libs.observability.tracing import configure_tracing, span

PHONE = "+4915112345678"
EMAIL = "jane.roe@example.com"
ID = "550e8400-e29b-41d4-a716-446655440000"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics((), version="0", service="test")


@pytest.fixture
def captured(metrics: Metrics) -> Iterator[CapturedLogs]:
    with capture_logs(metrics=metrics) as captured:
        yield captured


@pytest.fixture
def log() -> Logger:
    return get_logger("chat", "conversation")


class Gate:
    """A value that holds up whoever looks at it."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __str__(self) -> str:
        self.reached.set()
        self.open.wait(10)
        return "open"


def raised(message: str) -> Exception:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


def test_every_line_says_when_where_and_on_whose_behalf(captured: CapturedLogs, log: Logger) -> None:
    with bind(correlation_id=ID, tenant_id=3):
        log.info("message_stored", message="Message was stored", session_id=7)
        logging.getLogger("library").warning("hello")
    for line in captured.lines():
        assert {"timestamp", "level", "event", "message", "module", "component"} <= line.keys()
        assert (line["service"], line["version"]) == ("test", "0")
        assert (line["correlation_id"], line["tenant_id"]) == (ID, 3)
        assert line["timestamp"].endswith("Z")
    ours, theirs = captured.lines()
    assert (ours["level"], ours["event"], ours["session_id"]) == ("info", "message_stored", 7)
    assert (ours["message"], ours["module"], ours["component"]) == ("Message was stored", "conversation", "chat")
    assert (theirs["level"], theirs["event"], theirs["message"]) == ("warning", "library_log", "hello")
    assert (theirs["module"], theirs["logger"]) == ("infra", "library")


def test_fields_of_a_line_win_over_those_that_are_bound(captured: CapturedLogs, log: Logger) -> None:
    with bind(tenant_id=3):
        log.info("moved", tenant_id=4)
    assert captured.lines("moved")[0]["tenant_id"] == 4


def test_a_line_written_within_a_span_names_it(
    captured: CapturedLogs, log: Logger, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.observability.tracing._tracing", None)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    configure_tracing("test", "0", metrics)
    with span("work") as current:
        log.info("inside")
    log.info("outside")
    context = current.get_span_context()
    inside, outside = captured.lines()
    assert (inside["trace_id"], inside["span_id"]) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert not {"trace_id", "span_id"} & outside.keys()


def test_lines_below_the_level_are_not_written(captured: CapturedLogs, log: Logger) -> None:
    log.debug("unseen")
    logging.getLogger("library").debug("unseen")
    assert captured.lines() == []


@pytest.mark.parametrize(
    "name", ["arq.worker", "httpx", "httpx2", "sqlalchemy.engine.Engine", "uvicorn.error", "asyncio"]
)
def test_talkative_libraries_are_silent_below_warning(captured: CapturedLogs, name: str) -> None:
    logging.getLogger(name).info("%s", PHONE)
    logging.getLogger(name).warning("look")
    assert [line["message"] for line in captured.lines()] == ["look"]


def test_private_values_never_reach_the_file(captured: CapturedLogs, log: Logger, metrics: Metrics) -> None:
    with bind(user_note=f"prefers {EMAIL}"):
        log.info("stored", phone=PHONE, body="I feel unwell", token="hunter2", name="Jane Roe", message=f"by {EMAIL}")
    logging.getLogger("library").warning("to %s at %s", EMAIL, PHONE)
    log.error("failed", exc_info=raised(f"no route to {PHONE}"))
    raw = captured.raw()
    for private in (PHONE[:-4], EMAIL[:-4], "unwell", "hunter2", "Jane"):
        assert private not in raw
    assert metrics.sample("obs_log_redactions_total", kind="phone") == 3
    assert metrics.sample("obs_log_redactions_total", kind="email") == 3
    for kind in ("body", "secret", "name"):
        assert metrics.sample("obs_log_redactions_total", kind=kind) == 1


def test_bodies_are_shown_in_part_where_that_is_asked_for(log: Logger) -> None:
    with capture_logs(message_bodies=True) as captured:
        log.info("stored", body=f"Hello {PHONE}" + "!" * 80)
        assert captured.lines()[0]["body"].startswith("Hello ***5678!!!")
        assert len(captured.lines()[0]["body"]) < 60


@pytest.mark.parametrize(("level", "told"), [("INFO", False), ("DEBUG", True)])
def test_the_stack_of_an_exception_is_told_only_at_level_debug(log: Logger, level: str, told: bool) -> None:
    row = "unwell"
    with capture_logs(level) as captured:
        try:
            raise LookupError(f"nobody at {PHONE}\nDETAIL: Failing row contains ({row}).")
        except LookupError:
            log.error("failed", exc_info=True)
        logging.getLogger("library").error("failed", exc_info=raised("x"))
        ours, theirs = captured.lines()
    assert (ours["exception_type"], ours["error_message"]) == ("LookupError", "nobody at ***5678")
    assert (theirs["exception_type"], theirs["error_message"]) == ("ValueError", "x")
    for line in (ours, theirs):
        assert len(line["stack_fingerprint"]) == 16
        assert ("stack" in line) is told
        assert "exc_info" not in line
    if told:
        assert "raise LookupError" in ours["stack"]
        assert PHONE not in ours["stack"]
        assert row not in ours["stack"]


def test_a_fingerprint_stands_for_a_place_and_not_for_a_message(captured: CapturedLogs, log: Logger) -> None:
    for message in ("one", "two"):
        log.error("failed", exc_info=raised(message))
    try:
        raise ValueError("one")
    except ValueError as elsewhere:
        log.error("failed", exc_info=elsewhere)
    first, second, third = (line["stack_fingerprint"] for line in captured.lines())
    assert first == second != third


def test_no_exception_at_hand_is_no_fault(captured: CapturedLogs, log: Logger) -> None:
    log.error("failed", exc_info=True)
    assert "exception_type" not in captured.lines("failed")[0]


def test_arguments_that_do_not_fit_their_text_cost_neither_the_line_nor_privacy(
    captured: CapturedLogs, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("library").warning("%s and %s", PHONE)
    assert captured.lines()[0]["message"] == "%s and %s"
    assert PHONE not in capfd.readouterr().err


class Untellable:
    def __str__(self) -> str:
        raise RuntimeError


def cyclic() -> list[object]:
    circle: list[object] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize(
    "value",
    ["\ud800", {"a": "\udfff"}, {"\ud800": 1}, 2**80, float("nan"), b"\xff", object(), {1: {2: 3}}, {(1, 2): 3}],
    ids=lambda value: "an object" if type(value) is object else ascii(value),
)
def test_a_value_that_json_does_not_know_costs_neither_the_line_nor_its_other_fields(
    captured: CapturedLogs, log: Logger, value: object
) -> None:
    log.info("stored", value=value, session_id=7)
    log.info("next")
    assert [(line["event"], line.get("session_id")) for line in captured.lines()] == [("stored", 7), ("next", None)]


@pytest.mark.parametrize("value", [Untellable(), cyclic()], ids=["untellable", "cyclic"])
def test_a_value_that_cannot_be_looked_at_costs_its_line_nothing_but_the_fields(
    captured: CapturedLogs, log: Logger, value: object
) -> None:
    log.info("stored", value=value, phone=PHONE)
    log.info("next")
    stored, _ = captured.lines()
    assert (stored["event"], stored["level"], stored["component"]) == ("stored", "info", "chat")
    assert stored["unloggable"] in ("RuntimeError", "RecursionError")
    assert PHONE not in captured.raw()


def test_a_sink_that_fails_costs_the_log_nothing(tmp_path: Path, metrics: Metrics, log: Logger) -> None:
    def failing(fields: object, line: bytes) -> None:
        raise RuntimeError("no room")

    path = tmp_path / "log.jsonl"
    configured = configure_logging(LogSettings(service="test", version="0", path=path), metrics)
    configured.tee(failing)
    log.info("first")
    configured.flush()
    log.info("second")
    configured.close()
    assert [orjson.loads(line)["event"] for line in path.read_bytes().splitlines()] == ["first", "second"]


def test_when_the_queue_is_full_routine_lines_give_way_first_and_losses_are_counted(
    captured: CapturedLogs, log: Logger, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "ROUTINE_CAPACITY", 5)
    monkeypatch.setattr(logs, "CAPACITY", 8)
    gate = Gate()
    log.info("holds_up", gate=gate)
    assert gate.reached.wait(5)
    for _ in range(20):
        log.info("routine")
    for _ in range(10):
        log.warning("urgent")
    assert metrics.sample("obs_log_lines_dropped_total", level="routine") == 15
    assert metrics.sample("obs_log_lines_dropped_total", level="urgent") == 7
    gate.open.set()
    assert [line["event"] for line in captured.lines()] == ["holds_up"] + ["routine"] * 5 + ["urgent"] * 3


def test_a_full_file_is_put_aside_and_four_older_ones_are_kept(
    tmp_path: Path, metrics: Metrics, log: Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 1000)
    path = tmp_path / "below" / "service.jsonl"
    logging_ = configure_logging(LogSettings("test", "0", path=path), metrics)
    for number in range(60):
        log.info("counted", count=number)
        logging_.flush()
    logging_.close()
    files = [path, *(path.with_name(f"service.jsonl.{number}") for number in range(1, 5))]
    assert sorted(path.parent.iterdir()) == sorted(files)
    kept = [orjson.loads(line)["count"] for file in reversed(files) for line in file.read_bytes().splitlines()]
    assert kept == list(range(60 - len(kept), 60))
    for file in files:
        assert 0 < file.stat().st_size <= 1000
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_that_was_there_is_continued(tmp_path: Path, metrics: Metrics, log: Logger) -> None:
    path = tmp_path / "service.jsonl"
    for event in ("first", "second"):
        logging_ = configure_logging(LogSettings("test", "0", path=path), metrics)
        log.info(event)
        logging_.close()
    assert [orjson.loads(line)["event"] for line in path.read_bytes().splitlines()] == ["first", "second"]


def test_writing_goes_on_once_a_full_file_can_be_put_aside_again(
    tmp_path: Path,
    metrics: Metrics,
    log: Logger,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 1000)
    path, obstacle = tmp_path / "service.jsonl", tmp_path / "service.jsonl.4"
    path.with_name("service.jsonl.3").touch()
    obstacle.mkdir()
    logging_ = configure_logging(LogSettings("test", "0", path=path), metrics)
    for number in range(20):
        log.info("counted", count=number)
        logging_.flush()
    obstacle.rmdir()
    log.info("counted", count=20)
    logging_.close()
    assert "Cannot write logs" in capfd.readouterr().err
    assert [orjson.loads(line)["count"] for line in path.read_bytes().splitlines()] == [20]


def test_closing_writes_what_is_left_and_later_lines_are_lost_not_printed(
    tmp_path: Path, metrics: Metrics, log: Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "service.jsonl"
    logging_ = configure_logging(LogSettings("test", "0", path=path), metrics)
    for _ in range(1000):
        log.info("before")
    logging_.close()
    log.warning("after", note=PHONE)
    logging.getLogger("library").warning(PHONE)
    assert len(path.read_bytes().splitlines()) == 1000
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("unmasked", [True, False])
def test_unmasked_lines_of_level_debug_go_to_stdout_alone(
    metrics: Metrics, log: Logger, capsysbinary: pytest.CaptureFixture[bytes], unmasked: bool
) -> None:
    logging_ = configure_logging(LogSettings("test", "0", level="DEBUG", unmasked_debug=unmasked), metrics)
    log.debug("dialled", phone=PHONE)
    log.info("dialled", phone=PHONE)
    logging_.close()
    debug, info = map(orjson.loads, capsysbinary.readouterr().out.splitlines())
    assert debug["phone"] == (PHONE if unmasked else "***5678")
    assert info["phone"] == "***5678"


def test_a_file_never_holds_unmasked_lines(log: Logger) -> None:
    with capture_logs("DEBUG", unmasked_debug=True) as captured:
        log.debug("dialled", phone=PHONE)
        assert captured.lines("dialled")[0]["phone"] == "***5678"
