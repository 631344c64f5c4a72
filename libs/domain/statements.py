"""A span for each statement, within the trace of whoever sends it.

asyncpg's own instrumentation describes each statement at length, all of its text included, for 40 µs apiece: these
cost a fifth of that on bare connections, and half of it through SQLAlchemy, whose instrumentation has yet to learn its
present version. Both ways to the database are covered, and no statement is by both: SQLAlchemy prepares what it runs,
and asyncpg's log of queries is of all others.
"""

import re
import time
from functools import lru_cache
from typing import Any, Final

import asyncpg
from opentelemetry.trace import SpanKind
from sqlalchemy import Engine, event

from libs.observability.tracing import is_recording, record_step

_CHANGE: Final = re.compile(
    r"\b(?:(INSERT) INTO|(?<!FOR )(?<!KEY )(?<!DO )(UPDATE)|(DELETE) FROM)\s+(\w+)", re.IGNORECASE
)
_READ: Final = re.compile(r"\A\W*(?:WITH\b.*?\b)?(SELECT)\b.*?\bFROM\s+(\w+)\b(?!\()", re.IGNORECASE | re.DOTALL)
_ATTRIBUTES: Final = ("db.operation.name", "db.collection.name")
_WORD: Final = re.compile(r"\w+")


def trace_statements(connection: "asyncpg.Connection[Any]") -> None:
    """Has spans recorded of the statements of a bare connection, if there is a collector."""
    if is_recording():
        connection.add_query_logger(_logged)


def trace_engine(engine: Engine) -> None:
    """Likewise of the statements that go through SQLAlchemy, once it connects."""

    def connected(*_: Any) -> None:
        if is_recording():
            event.listen(engine, "before_cursor_execute", _begun)
            event.listen(engine, "after_cursor_execute", _finished)
            event.listen(engine, "handle_error", _failed)

    event.listen(engine, "first_connect", connected)


@lru_cache(maxsize=1024)
def summary(statement: str) -> tuple[str, ...]:
    """What a statement is about: its last change and the changed table, `("INSERT", "messages")`, else what it reads,
    or its first word. Empty for what is none, such as a ping."""
    changes = [tuple(filter(None, found)) for found in _CHANGE.findall(statement)]
    if changes or (changes := _READ.findall(statement)):
        operation, table = changes[-1]
        return operation.upper(), table
    word = _WORD.search(statement)
    return (word[0].upper(),) if word else ()


def _logged(query: Any) -> None:
    ended_ns = time.time_ns()
    trace_statement(query.query, ended_ns - int(query.elapsed * 1e9), ended_ns, query.exception)


def _begun(_: Any, __: Any, ___: str, ____: Any, context: Any, *_____: Any) -> None:
    context.began_ns = time.time_ns()


def _finished(_: Any, __: Any, statement: str, ___: Any, context: Any, *____: Any) -> None:
    trace_statement(statement, context.began_ns, time.time_ns(), None)


def _failed(failure: Any) -> None:
    began_ns = getattr(failure.execution_context, "began_ns", None)
    if began_ns is not None:
        error = failure.original_exception
        trace_statement(failure.statement, began_ns, time.time_ns(), error.__cause__ or error)


def trace_statement(statement: str, start_ns: int, end_ns: int, error: BaseException | None) -> None:
    """Records a statement that is over, from `start_ns` to `end_ns` in Unix time, within the current span."""
    words = summary(statement)
    if words:
        name = " ".join(words)
        record_step(
            name,
            kind=SpanKind.CLIENT,
            start_ns=start_ns,
            end_ns=end_ns,
            failed=None if error is None else type(error).__name__,
            attributes={"db.system.name": "postgresql", **dict(zip(_ATTRIBUTES, words, strict=False))},
        )
