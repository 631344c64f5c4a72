"""Which traces are kept: a share of all, chosen by their ids, and every one that contains an error.

The share is chosen at the beginning (`is_chosen`). All others are remembered by `Tail` for a while, in this process
alone, and forgotten unless one of their spans fails. Then what is remembered is exported, and so is what comes later;
`KeepBus` tells the other processes, which may have had a part in the same trace.
"""

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Generic, Literal, Protocol, TypeVar

from libs.observability.registry import Metrics

OPEN_TRACES: Final = 4096
"""Traces that may have open spans at the same time; of more, those that began first lose theirs."""
SPANS_PER_TRACE: Final = 512
"""Ended spans of one trace that are remembered; more are not."""
REMEMBERED_SPANS: Final = 16_384
"""Spans of ended traces that are remembered, and for so many seconds; the oldest make room."""
REMEMBERED_SECONDS: Final = 60.0

VERDICTS: Final = 1024
"""Trace ids that wait to be told to other processes; of more, the oldest are not."""
PUBLISH_SECONDS: Final = 0.5

_ID_BYTES: Final = 16

Reason = Literal["head", "error", "remote"]
S = TypeVar("S")


def is_chosen(trace_id: int, ratio: float) -> bool:
    """Whether a trace belongs to the share that is kept in any case: by its id alone, as OpenTelemetry's
    `TraceIdRatioBased` has it, so that all processes agree, whatever a caller's flags say. A caller who chooses the id
    chooses whether it is kept."""
    return trace_id & 0xFFFF_FFFF_FFFF_FFFF < round(ratio * 2**64)


class Trace(Generic[S]):
    """The part that this process has in one trace. `kept` is why it is exported, None as long as it is not."""

    __slots__ = ("announced", "ended_at", "id", "kept", "open", "room", "spans")

    def __init__(self, trace_id: int, kept: Reason | None) -> None:
        self.id: Final = trace_id
        self.kept = kept
        self.announced = False
        self.open = 0
        self.room = SPANS_PER_TRACE
        self.spans: list[S] = []
        self.ended_at = 0.0

    def take(self, span: S | None = None) -> Sequence[S]:
        """All spans so far, and `span`; they are not remembered any longer."""
        spans, self.spans = self.spans, []
        if span is not None:
            spans.append(span)
        return spans


class _Turn:
    """A lock that is free or not: it is not for a thread that has it already. Python may collect an abandoned
    coroutine at any moment, and have it end its spans in the middle of what that thread is doing."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0

    def __enter__(self) -> bool:
        self._lock.acquire()
        self._depth += 1
        return self._depth == 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()


class Tail(Generic[S]):
    """Remembers the ended spans of traces that are not kept, in case they will be. `export` gets those that are,
    one by one; `on_error` the id of each trace that an error made worth keeping. For use by any thread."""

    def __init__(self, export: Callable[[S], None], metrics: Metrics) -> None:
        self._export = export
        self.on_error: Callable[[int], None] = lambda trace_id: None
        self._announced = {
            reason: metrics.counter("obs_traces_kept_total", reason) for reason in ("head", "error", "remote")
        }
        self._evicted = metrics.counter("obs_spans_dropped_total", "evicted")
        self._truncated = metrics.counter("obs_spans_dropped_total", "truncated")
        self._turn = _Turn()
        self._late: deque[tuple[Trace[S], S, bool]] = deque()
        self._open: dict[int, Trace[S]] = {}
        self._over: OrderedDict[int, Trace[S]] = OrderedDict()
        self._remembered = 0

    def begin(self, trace_id: int, *, chosen: bool) -> Trace[S]:
        """A span of that trace begins; `ended` must follow."""
        with self._turn as free:
            if not free:
                return Trace(trace_id, "head" if chosen else None)  # which nothing remembers
            trace = self._open.get(trace_id)
            if trace is None:
                trace = self._forget(trace_id) or Trace(trace_id, "head" if chosen else None)
                self._open[trace_id] = trace
                if len(self._open) > OPEN_TRACES:
                    self._give_up(next(iter(self._open.values())))
            trace.open += 1
            return trace

    def ended(self, trace: Trace[S], span: S, *, failed: bool) -> None:
        at_once = self._end(trace, span, failed)
        while at_once and self._late:
            try:
                late = self._late.popleft()
            except IndexError:
                break  # another thread was faster
            self._end(*late)

    def keep(self, trace_id: int) -> None:
        """Another process found an error in that trace: what there is of it here is exported, and what may come."""
        with self._turn:
            trace = self._open.get(trace_id) or self._forget(trace_id) or Trace(trace_id, None)
            spans = trace.take()
            trace.kept = trace.kept or "remote"
            if trace.open == 0:
                self._remember(trace)
        self._hand_over(trace, spans)

    def sizes(self) -> tuple[int, int]:
        """How many traces have open spans, and how many spans of ended traces are remembered."""
        with self._turn:
            return len(self._open), sum(len(trace.spans) for trace in self._over.values())

    def _end(self, trace: Trace[S], span: S, failed: bool) -> bool:
        """Whether that was possible now; else it is for whoever is next to end a span."""
        spans: Sequence[S] = ()
        found = False
        with self._turn as free:
            if not free:
                self._late.append((trace, span, failed))
                return False
            if trace.kept:
                spans = (span,)
            elif failed:
                spans, found, trace.kept = trace.take(span), True, "error"
            elif len(trace.spans) < trace.room:
                trace.spans.append(span)
            else:
                self._truncated.inc()
            trace.open -= 1
            if trace.open == 0 and self._open.get(trace.id) is trace:
                del self._open[trace.id]
                if trace.kept != "head":
                    self._remember(trace)
        self._hand_over(trace, spans)
        if found:
            self.on_error(trace.id)
        return True

    def _hand_over(self, trace: Trace[S], spans: Sequence[S]) -> None:
        if spans and trace.kept and not trace.announced:
            trace.announced = True
            self._announced[trace.kept].inc()
        for span in spans:
            self._export(span)

    def _remember(self, trace: Trace[S]) -> None:
        trace.ended_at = time.monotonic()
        self._over[trace.id] = trace
        self._remembered += len(trace.spans) + 1  # or verdicts about traces that never come would have no bound
        while self._remembered > REMEMBERED_SPANS:
            self._evicted.inc(len(self._forget(next(iter(self._over))).spans))  # type: ignore[union-attr]
        while (oldest := next(iter(self._over.values()), trace)).ended_at < trace.ended_at - REMEMBERED_SECONDS:
            self._forget(oldest.id)

    def _forget(self, trace_id: int) -> Trace[S] | None:
        trace = self._over.pop(trace_id, None)
        if trace is not None:
            self._remembered -= len(trace.spans) + 1
        return trace

    def _give_up(self, trace: Trace[S]) -> None:
        """Makes room for other traces; of this one only errors are still exported."""
        del self._open[trace.id]
        self._evicted.inc(len(trace.take()))
        trace.room = 0


class Bus(Protocol):
    """Carries messages between the processes of a system; what gets lost is lost."""

    async def publish(self, message: bytes) -> None:
        """May raise, or take long."""

    async def listen(self, hear: Callable[[bytes], None]) -> None:
        """Calls `hear` with every message, the process's own among them, until cancelled."""


class KeepBus:
    """Tells other processes which traces turned out to contain an error, and heeds what they tell. Without the bus
    each process keeps its own side."""

    def __init__(self, tail: Tail[S], bus: Bus) -> None:
        self._keep = tail.keep
        self._bus = bus
        self._found: deque[int] = deque(maxlen=VERDICTS)
        self._waiting = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        tail.on_error = self._note

    @asynccontextmanager
    async def sharing(self) -> AsyncIterator[None]:
        """Tells and heeds for the length of the block, in the background."""
        tasks = [asyncio.create_task(self._bus.listen(self._heed)), asyncio.create_task(self._tell())]
        try:
            yield
        finally:
            await self._publish()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note(self, trace_id: int) -> None:
        self._found.append(trace_id)
        with suppress(RuntimeError):  # the loop has ended, and with it whoever could tell
            self._loop.call_soon_threadsafe(self._waiting.set)

    async def _tell(self) -> None:
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            await self._publish()

    async def _publish(self) -> None:
        found = [self._found.popleft() for _ in range(len(self._found))]
        if not found:
            return
        with suppress(Exception):
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self._bus.publish(b"".join(trace_id.to_bytes(_ID_BYTES) for trace_id in found))

    def _heed(self, message: bytes) -> None:
        for start in range(0, len(message) - _ID_BYTES + 1, _ID_BYTES):
            self._keep(int.from_bytes(message[start : start + _ID_BYTES]))
