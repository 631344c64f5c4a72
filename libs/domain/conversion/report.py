"""What a conversion says: one log line per appointment and per run, metrics, and a span in the trace
of the confirm that led to it."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from libs.domain.conversion.causes import WAITING
from libs.domain.conversion.runs import SOURCE, Outcome, Run, Task
from libs.domain.telemetry import logger
from libs.observability.context import carrier
from libs.observability.registry import Metrics
from libs.observability.tracing import exemplar, record_span

_log: Final = logger("conversion")

# Early conversions are runs of a legacy command, which tells of them itself.
_RUN_EVENT: Final[dict[Task, str]] = {
    "auto_start": "appointment_auto_start_run",
    "recovery": "appointment_recovery_run",
}


class Reporter:
    """Reports outcomes once they are committed. `metrics` is None for a process whose runs are counted
    later, from their rows."""

    def __init__(self, metrics: Metrics | None) -> None:
        self._metrics = metrics

    def batch(self, run: Run, outcomes: list[Outcome], began_ns: int) -> None:
        log = _log.bind(source=SOURCE, job_run_id=str(run.run_id))
        for outcome in outcomes:
            tell = log.info if outcome.result != "failed" else log.warning
            tell(
                "appointment_session_conversion",
                appointment_id=outcome.appointment_id,
                tenant_id=outcome.tenant_id,
                correlation_id=outcome.carrier.get("correlation_id"),
                result=outcome.result,
                session_id=outcome.session_id,
                failure_reason=outcome.reason,
                error_message=outcome.error_message,
                modality=outcome.modality,
                delay_ms=None if outcome.delay is None else round(outcome.delay * 1000, 2),
            )
        self._trace(outcomes, began_ns)
        if self._metrics is not None:
            count(self._metrics, run.task, [(o.result, o.modality, o.reason, 1) for o in outcomes])
            if run.task == "auto_start":
                delay = self._metrics.histogram("appointment_start_delay_seconds")
                for outcome in outcomes:
                    if outcome.result == "created" and outcome.delay is not None:
                        delay.observe(outcome.delay, exemplar(outcome.carrier))

    def finished(self, run: Run, *, dry_run: bool = False) -> None:
        _log.info(_RUN_EVENT[run.task], **run.fields(), dry_run=dry_run)
        if self._metrics is not None:
            duration = self._metrics.histogram("appointment_conversion_run_duration_seconds", run.task)
            duration.observe(run.runtime_ms / 1000)

    def ran(self, run: Run) -> None:
        """A run has ended, whether or not it found anything."""
        if self._metrics is not None:
            self._metrics.gauge("appointment_conversion_last_run_timestamp_seconds", run.task).set(time.time())

    def _trace(self, outcomes: Sequence[Outcome], began_ns: int) -> None:
        """The batch may convert what was confirmed weeks ago in many traces: each one gets a span of its own there,
        linked to the batch. A failure is an error of that trace, unless a party is merely busy."""
        ended_ns = time.time_ns()
        batch = carrier()
        for outcome in outcomes:
            failed = outcome.result == "failed" and outcome.reason != WAITING
            if outcome.span_id is not None or failed:
                record_span(
                    "appointments.convert",
                    parent=outcome.carrier,
                    # What the outbox refers to is in that trace however many attempts there were.
                    attempt=outcome.attempt if failed else 1,
                    span_id=outcome.span_id,
                    start_ns=began_ns,
                    end_ns=ended_ns,
                    links=[batch],
                    failed=outcome.reason if failed else None,
                    appointment_id=outcome.appointment_id,
                    session_id=outcome.session_id,
                    tenant_id=outcome.tenant_id,
                )


def count(metrics: Metrics, task: str, outcomes: Sequence[tuple[str, str, str | None, int]]) -> None:
    """Adds outcomes, given as (result, modality, reason, number), to the conversion counters."""
    tally: Counter[tuple[str, str]] = Counter()
    for result, modality, reason, number in outcomes:
        tally[result, modality if result == "created" else reason or ""] += number
    attempted = 0
    for (result, detail), number in tally.items():
        if result == "skipped":
            metrics.counter("appointment_session_conversion_skipped_total").inc(number)
            continue
        attempted += number
        name = (
            "appointment_sessions_created_total"
            if result == "created"
            else "appointment_session_conversion_failed_total"
        )
        metrics.counter(name, detail).inc(number)
    if attempted:
        metrics.counter("appointment_session_conversion_attempted_total", task).inc(attempted)
