"""Log events as data: what each is called, how severe it is, and what its lines say."""

import re
from dataclasses import dataclass
from typing import Final, Literal

Level = Literal["debug", "info", "warning", "error", "critical"]
Category = Literal["connection", "message", "ai", "security", "performance", "error"]

SEVERITY: Final[dict[str, int]] = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

EVERY_LINE: Final = ("timestamp", "level", "event", "component", "module", "service", "version")
"""The fields that every line has, whatever its event."""

_NAME = re.compile(r"[a-z]+(_[a-z]+)*")


@dataclass(frozen=True, slots=True)
class LogEvent:
    """`level` is the least severe one at which it is logged. `required` are the fields of each of its lines, besides
    those of every line, though their values may be null; they are passed to the logger or are bound already.
    `category` is added to its lines."""

    name: str
    level: Level
    required: tuple[str, ...]
    category: Category | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not snake_case.")


def event(name: str, level: Level, *required: str, category: Category | None = None) -> LogEvent:
    """An event. What is logged as an error is of the category `error` unless another one is given."""
    return LogEvent(name, level, required, category or ("error" if level == "error" else None))


OWN: Final = (
    event("http_request", "info", "method", "route", "status", "latency_ms", "correlation_id"),
    event("slow_operation", "warning", "route", "latency_ms", "correlation_id", category="performance"),
    event("library_log", "debug", "message", "logger"),
)
"""What the library itself logs."""
