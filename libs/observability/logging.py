"""Structured logs: one JSON object per line, redacted, written by a thread of its own.

    log = get_logger("chat", "conversation")
    log.info("chat_message_stored", session_id=7, message_id=12)

The first argument is a constant; whatever varies is a field. The caller's side only collects fields
and puts them on a bounded queue; masking, encoding and writing happen behind it.
"""

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

import orjson
from opentelemetry import trace

from libs.observability.context import fields
from libs.observability.events import OWN, SEVERITY, LogEvent
from libs.observability.redaction import OURS, Masked, Redactor
from libs.observability.registry import Metrics
from libs.observability.stacks import Stack, places_of

ROUTINE_CAPACITY: Final = 8_000
CAPACITY: Final = 10_000
"""Lines that may wait for the writer: DEBUG and INFO give way first, the rest only when it is full."""

PAUSE_SECONDS: Final = 0.01
"""How long lines wait for others before they are written: to wake the writer for each would cost the event loop
more than the writing."""

FILE_BYTES: Final = 50_000_000
FILES: Final = 5

# They repeat what they are given, or talk of every byte.
_QUIET: Final = (
    *("arq", "httpx", "httpx2", "httpcore", "httpcore2", "websockets", "sqlalchemy.engine", "uvicorn"),
    *("asyncio", "opentelemetry"),
)


@dataclass(frozen=True, slots=True)
class LogSettings:
    """`path` None means stdout. `message_bodies` shows the first 50 characters of bodies, scrubbed.
    `unmasked_debug` leaves DEBUG lines unmasked, on stdout only: never in production. Of `events` lines get their
    category."""

    service: str
    version: str
    level: str = "INFO"
    path: Path | None = None
    message_bodies: bool = False
    unmasked_debug: bool = False
    events: Mapping[str, LogEvent] = field(default_factory=lambda: {each.name: each for each in OWN})


class Sink(Protocol):
    """Takes lines as they are written, such as for a place where they can be searched. It is called by the thread
    that writes the log, so it must neither wait nor raise."""

    def __call__(self, fields: Mapping[str, Any], line: bytes) -> None:
        """`fields` are masked, and `line` is what they are in JSON."""


Line: TypeAlias = dict[str, Any]


class Logger:
    """What `get_logger` answers. `exc_info` takes an exception, or True for the one being handled. Until
    `configure_logging` is called, lines are lost."""

    __slots__ = ("_own",)

    def __init__(self, **own: Any) -> None:
        self._own = own

    def bind(self, **more: Any) -> "Logger":
        """A logger all of whose lines have these fields as well."""
        return Logger(**(self._own | more))

    def debug(self, event: str, **told: Any) -> None:
        _tell("debug", event, self._own, told)

    def info(self, event: str, **told: Any) -> None:
        _tell("info", event, self._own, told)

    def warning(self, event: str, **told: Any) -> None:
        _tell("warning", event, self._own, told)

    def error(self, event: str, **told: Any) -> None:
        _tell("error", event, self._own, told)

    def critical(self, event: str, **told: Any) -> None:
        _tell("critical", event, self._own, told)


def get_logger(component: str, module: str) -> Logger:
    """The logger of one component, which belongs to one module of the log taxonomy."""
    return Logger(component=component, module=module)


_logging: "Logging | None" = None


def configure_logging(settings: LogSettings, metrics: Metrics) -> "Logging":
    """Starts the writer and directs everything to it, the standard library's records too."""
    global _logging
    _logging = Logging(settings, metrics)
    logging.basicConfig(handlers=[_StandardHandler()], level=settings.level.upper(), force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    return _logging


def _tell(level: str, event: str, own: Line, told: Line) -> None:
    if _logging is not None and SEVERITY[level] >= _logging.least:
        _logging.tell(level, {**own, **told, "event": event})


class Logging:
    """The process's logs, until `close`. `least` is the severity of the least severe lines that are written."""

    def __init__(self, settings: LogSettings, metrics: Metrics) -> None:
        self.least: Final = SEVERITY[settings.level.lower()]
        self._constants: Final = {"service": settings.service, "version": settings.version}
        self._categories: Final = {name: event.category for name, event in settings.events.items() if event.category}
        self._writer: Final = _Writer(settings, metrics)

    def tell(self, level: str, told: Line) -> None:
        """Has a line written that says besides when and where it was told."""
        line = {**fields(), **self._constants, **told, "level": level}
        line["timestamp"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        if category := self._categories.get(line["event"]):
            line["category"] = category
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"], line["span_id"] = f"{span.trace_id:032x}", f"{span.span_id:016x}"
        if error := line.pop("exc_info", None):
            stack = self.least <= SEVERITY["debug"]
            line.update(_described(sys.exception() if error is True else error, stack=stack))
        self._writer.put(line)

    def tee(self, sink: Sink | None) -> None:
        """Hands `sink` all lines that are written from now on, but for those that are not masked; None ends that."""
        self._writer.sink = sink

    def flush(self) -> None:
        """Returns once everything logged so far is written."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left and stops the writer; lines logged later are lost."""
        self._writer.close()


def _described(error: BaseException | None, *, stack: bool) -> Line:
    """An exception as fields. The fingerprint is the same for the same place in the program; the stack
    itself is told only where everything is, at level DEBUG."""
    if error is None:
        return {}
    place = "|".join(f"{code.co_filename.rsplit('/', 2)[-1]}:{code.co_name}" for code, _ in places_of(error))
    described: Line = {
        "exception_type": type(error).__name__,
        "error_message": str(error).strip().partition("\n")[0],
        "stack_fingerprint": hashlib.sha256(f"{type(error).__name__}|{place}".encode()).hexdigest()[:16],
    }
    if stack:
        described["stack"] = Stack(error)
    return described


class _StandardHandler(logging.Handler):
    """Records of libraries, as lines of ours."""

    _log: Final = get_logger("library", "infra")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            told = getattr(self._log, record.levelname.lower(), self._log.warning)
            error = record.exc_info[1] if record.exc_info else None
            told("library_log", message=_message(record), logger=record.name, exc_info=error)
        except Exception:
            self.handleError(record)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):
        # The arguments do not fit: what the standard library would print about that is not masked.
        return str(record.msg)


def is_urgent(level: str) -> bool:
    """Whether lines of that level are kept when others have to give way."""
    return SEVERITY.get(level, 0) >= SEVERITY["warning"]


_Entry: TypeAlias = Line | threading.Event | None


class _Writer:
    """The queue and the thread behind it. An Event in the queue is set once its turn comes; None ends."""

    def __init__(self, settings: LogSettings, metrics: Metrics) -> None:
        def masked(kind: Masked) -> None:
            metrics.counter("obs_log_redactions_total", kind).inc()

        self._queue: SimpleQueue[_Entry] = SimpleQueue()
        self._redactor: Final = Redactor(preview=settings.message_bodies, on_masked=masked)
        self._unmasked_debug: Final = settings.unmasked_debug and settings.path is None
        self._dropped_routine = metrics.counter("obs_log_lines_dropped_total", "routine")
        self._dropped_urgent = metrics.counter("obs_log_lines_dropped_total", "urgent")
        self._write: Callable[[bytes], None] = _stdout if settings.path is None else _RotatingFile(settings.path).write
        self.sink: Sink | None = None
        self._open = True
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self._thread.start()

    def put(self, line: Line) -> None:
        if not self._open:
            return
        urgent = is_urgent(line["level"])
        if self._queue.qsize() < (CAPACITY if urgent else ROUTINE_CAPACITY):
            self._queue.put(line)
        else:
            (self._dropped_urgent if urgent else self._dropped_routine).inc()

    def flush(self) -> None:
        reached = threading.Event()
        self._queue.put(reached)
        reached.wait(timeout=5)

    def close(self) -> None:
        self._open = False
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        going = True
        while going:
            lines: list[bytes] = []
            reached: list[threading.Event] = []
            entry: _Entry = self._queue.get()
            if isinstance(entry, dict):
                time.sleep(PAUSE_SECONDS)
            while True:
                if entry is None:
                    going = False
                elif isinstance(entry, threading.Event):
                    reached.append(entry)
                else:
                    lines.append(self._encode(entry))
                if self._queue.empty() or len(lines) >= 500:
                    break
                entry = self._queue.get()
            if lines:
                try:
                    self._write(b"".join(lines))
                except (OSError, ValueError) as error:  # ValueError: stdout is closed
                    print(f"Cannot write logs: {error}", file=sys.stderr)  # noqa: T201
            for event in reached:
                event.set()

    def _encode(self, event: Line) -> bytes:
        masks = not (self._unmasked_debug and event["level"] == "debug")
        try:
            if masks:
                event = self._redactor.fields(event)
            line = _json(event)
        except Exception as error:
            # Values are looked at only here, and may do anything: the line itself must not be lost to them.
            event = {key: value for key, value in event.items() if key in OURS and isinstance(value, str)}
            event["unloggable"] = type(error).__name__
            line = _json(event)
        sink = self.sink
        if masks and sink is not None:
            with suppress(Exception):  # whatever a sink makes of it, the line has to be written
                sink(event, line)
        return line


def _json(event: Line) -> bytes:
    try:
        return orjson.dumps(event, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except TypeError:
        # Such as a lone surrogate or an integer beyond 64 bits.
        return json.dumps(event, default=str, ensure_ascii=False).encode(errors="replace") + b"\n"


def _stdout(lines: bytes) -> None:
    sys.stdout.buffer.write(lines)
    sys.stdout.buffer.flush()


class _RotatingFile:
    """Appends to a file, of which the present one and four older ones are kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = self._open()

    def write(self, lines: bytes) -> None:
        if self._file.tell() + len(lines) > FILE_BYTES:
            self._file.close()
            try:
                for number in range(FILES - 2, 0, -1):
                    older = self._numbered(number)
                    if older.exists():
                        older.replace(self._numbered(number + 1))
                self._path.replace(self._numbered(1))
            finally:
                self._file = self._open()
        self._file.write(lines)
        self._file.flush()

    def _open(self) -> BinaryIO:
        # Readable by the owner alone, whatever the umask.
        return os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
