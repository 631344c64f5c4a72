"""One job: decode, observe, run. The job itself is a hint, so its handler is a wake-up call."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from arq import func
from arq.connections import ArqRedis
from arq.typing import WorkerCoroutine
from arq.worker import Function, Worker
from opentelemetry.trace import SpanKind
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from libs.domain.doorbell import deserialise, serialise
from libs.domain.jobs import JOBS, Job
from libs.domain.telemetry import logger
from libs.observability.context import continued
from libs.observability.registry import Metrics
from libs.observability.tracing import exemplar, span

_log: Final = logger("worker")

Handlers = Mapping[type[Job], Callable[[], None]]

FIRST_WAIT: Final = 0.5
LONGEST_WAIT: Final = 10.0


def functions(handlers: Handlers, metrics: Metrics) -> list[Function]:
    """The arq functions of all jobs. Raises LookupError when a job has no handler."""
    missing = [job.name for job in JOBS.values() if job not in handlers]
    if missing:
        raise LookupError(f"No handler for the jobs {', '.join(missing)}.")

    def observed(job: type[Job], handler: Callable[[], None]) -> Function:
        async def run(context: dict[str, Any], *, payload: dict[str, Any], carrier: dict[str, str]) -> None:
            began = time.perf_counter()
            result = "error"
            attempt = context["job_try"]
            with (
                continued(carrier),
                span(f"arq.job {job.name}", kind=SpanKind.CONSUMER, parent=carrier, attempt=attempt) as current,
            ):
                current.set_attribute("job.try", attempt)
                try:
                    job(**payload)
                    handler()
                    result = "ok"
                finally:
                    took = time.perf_counter() - began
                    metrics.histogram("job_duration_seconds", job.name, result).observe(took, exemplar())
                    _log.info("job_finished", task=job.name, result=result, duration_ms=round(took * 1000, 2))

        # arq's own type knows positional arguments only.
        return func(cast(WorkerCoroutine, run), name=job.name)

    return [observed(job, handler) for job, handler in handlers.items()]


async def listen(url: str, jobs: list[Function]) -> None:
    """Answers the doorbell until cancelled. Without Redis it waits and tries again: nothing depends on it."""
    wait = FIRST_WAIT
    while True:
        redis = ArqRedis(
            ConnectionPool.from_url(
                url,
                socket_timeout=2,
                socket_connect_timeout=1,
                health_check_interval=15,
                max_connections=20,
                retry=Retry(ExponentialBackoff(cap=2, base=0.1), 3),
                retry_on_error=[RedisError, OSError],
            ),
            job_serializer=serialise,
            job_deserializer=deserialise,
        )
        worker = Worker(
            jobs,
            redis_pool=redis,
            handle_signals=False,
            max_jobs=8,
            job_timeout=10,
            max_tries=5,
            keep_result=0,
            poll_delay=0.5,
            job_completion_wait=15,
            health_check_interval=5,
            allow_abort_jobs=False,
            log_results=False,
            job_serializer=serialise,
            job_deserializer=deserialise,
        )
        began = time.monotonic()
        try:
            await worker.async_run()
        except (RedisError, OSError) as error:
            _log.warning("doorbell_lost", exception_type=type(error).__name__, retry_seconds=wait)
        finally:
            await redis.aclose()
        wait = FIRST_WAIT if time.monotonic() - began > LONGEST_WAIT else min(2 * wait, LONGEST_WAIT)
        await asyncio.sleep(wait)
