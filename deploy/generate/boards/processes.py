"""Have the processes what they need: a database, time of the processor, memory, and each other?"""

from typing import Final

from grafana_foundation_sdk.models import units

from deploy.generate.boards.panels import Column, Query, above, board, latency, row, stat, table, timeseries, variable
from deploy.generate.boards.promql import increase, largest, per_minute, quantile, total

_CHOSEN: Final = '{job=~"$job", instance=~"$instance"}'
_BY_PROCESS: Final = "{{job}} {{instance}}"

BOARD: Final = board(
    "processes",
    "database and workers",
    "Whether every process is there and has connections, processor time and memory, and whether workers keep up.",
    row(
        "Now",
        [
            stat(
                "Processes that answer",
                "By what they are. Fewer than you started means that one is gone, or that Prometheus may not read it.",
                total(f"up{_CHOSEN}", "job"),
                unit=units.Short,
                legend="{{job}}",
            ),
            stat(
                "Connections in use",
                "Of the fullest pool.",
                "max(db_connections_in_use / on (instance, job, pool) (db_connections_max > 0))",
                unit=units.PercentUnit,
                limits=above(0.6, 0.8),
            ),
            stat(
                "Waiting in queues",
                "Deliveries in the outbox, and wake-up calls that wait for a worker.",
                largest("worker_queue_depth", "queue"),
                unit=units.Short,
                legend="{{queue}}",
            ),
            stat(
                "Slowest loop, P99",
                "How late the most delayed process was for everything in the last five minutes.",
                f"max({quantile(0.99, f'asyncio_loop_lag_seconds{_CHOSEN}', 'instance', over='5m')})",
                unit=units.Seconds,
                limits=above(0.1, 0.5),
            ),
            stat(
                "Since the last audit",
                "Workers audit the database in turn.",
                f"time() - {largest('audit_last_run_timestamp_seconds')}",
                unit=units.Seconds,
                limits=above(1800),
            ),
            stat(
                "Between audits",
                "How often workers are to audit; 0 is never.",
                largest("audit_interval_seconds"),
                unit=units.Seconds,
            ),
            stat(
                "Since the last measurement",
                "Workers measure the state of the database every 15 seconds.",
                f"time() - {largest('gauges_last_run_timestamp_seconds')}",
                unit=units.Seconds,
                limits=above(60, 120),
            ),
            stat(
                "Telemetry lost, 1 h",
                "Log lines and spans that had no room. What you see is then not all that happened.",
                increase("obs_log_lines_dropped_total", over="1h")
                + " + "
                + increase("obs_spans_dropped_total", over="1h"),
                unit=units.Short,
                limits=above(1),
            ),
        ],
    ),
    row(
        "Database",
        [
            timeseries(
                "Connections in use",
                "The share of each pool. At 80 % requests begin to wait for one.",
                Query(
                    f"db_connections_in_use{_CHOSEN} / on (instance, job, pool) (db_connections_max > 0)",
                    "{{pool}} {{instance}}",
                ),
                unit=units.PercentUnit,
                limits=above(0.8),
            ),
            timeseries(
                "Connections at most",
                "Of all pools together; PostgreSQL has to allow as many.",
                Query(total("db_connections_max", "pool"), "{{pool}}"),
                unit=units.Short,
                stacked=True,
            ),
            timeseries(
                "Waited in vain for a connection",
                "A pool was exhausted for two seconds; requests are refused with 503.",
                Query(per_minute("db_pool_timeouts_total", "pool", "instance"), "{{pool}} {{instance}}"),
                unit=units.CountsPerMinute,
            ),
            table(
                "Invariants that are violated",
                "`sessiongate audit` names the rows, `sessiongate explain` tells their story.",
                Column("rows", largest("audit_violations", "invariant") + " > 0", units.Short),
                empty="all hold",
            ),
        ],
    ),
    row(
        "Workers",
        [
            timeseries(
                "Jobs",
                "What woke workers, and how it ended.",
                Query(per_minute("job_duration_seconds_count", "task", "result"), "{{task}}: {{result}}"),
                unit=units.CountsPerMinute,
            ),
            latency("Duration of jobs, P95", "By task.", "job_duration_seconds", "task"),
            timeseries(
                "Waiting in queues",
                "What no worker has taken up yet.",
                Query(largest("worker_queue_depth", "queue"), "{{queue}}"),
                unit=units.Short,
            ),
        ],
    ),
    row(
        "Processes",
        [
            timeseries(
                "Processor",
                "How much of one core each process takes. It cannot use another: at 1 everything waits.",
                Query(f"rate(process_cpu_seconds_total{_CHOSEN}[$__rate_interval])", _BY_PROCESS),
                unit=units.PercentUnit,
                limits=above(0.8),
            ),
            timeseries(
                "Memory",
                "The share of what each process may have. At 1 it is killed.",
                Query(
                    f"process_resident_memory_bytes{_CHOSEN} / on (instance, job) (process_memory_limit_bytes > 0)",
                    _BY_PROCESS,
                ),
                unit=units.PercentUnit,
                limits=above(0.9),
            ),
            timeseries(
                "Memory in bytes",
                "A line that only rises is a leak.",
                Query(f"process_resident_memory_bytes{_CHOSEN}", _BY_PROCESS),
                unit=units.BytesIEC,
            ),
        ],
        [
            timeseries(
                "Event-loop lag, P99",
                "How late each process was for everything: something computes where it should wait.",
                Query(quantile(0.99, f"asyncio_loop_lag_seconds{_CHOSEN}", "job", "instance"), _BY_PROCESS),
                unit=units.Seconds,
                limits=above(0.1, 0.5),
            ),
            timeseries(
                "Tasks",
                "Live asyncio tasks. They follow requests and sockets; a line that only rises is a leak.",
                Query(f"asyncio_tasks{_CHOSEN}", _BY_PROCESS),
                unit=units.Short,
            ),
            timeseries(
                "Open files",
                "The share of the files and connections that each process may have open.",
                Query(f"process_open_fds{_CHOSEN} / process_max_fds{_CHOSEN}", _BY_PROCESS),
                unit=units.PercentUnit,
                limits=above(0.8),
            ),
        ],
        [
            timeseries(
                "Restarts",
                "Starts of processes in the last ten minutes: one is a rollout, several are a crash loop.",
                Query(f"changes(process_start_time_seconds{_CHOSEN}[10m])", _BY_PROCESS),
                unit=units.Short,
            ),
            table(
                "Versions",
                "Which version runs where.",
                Column("processes", "count by (service, version, python) (build_info)", units.Short),
            ),
            timeseries(
                "Wake-up calls lost",
                "What Redis did not take.",
                Query(per_minute("doorbell_failures_total", "job", "instance"), _BY_PROCESS),
                unit=units.CountsPerMinute,
            ),
        ],
    ),
    row(
        "Telemetry itself",
        [
            timeseries(
                "Log lines lost",
                "Because their queue was full; `routine` lines go first.",
                Query(per_minute("obs_log_lines_dropped_total", "level"), "{{level}}"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Log lines that cannot be searched",
                "`routine`: there were more in a second than are stored. `urgent`: the database took none.",
                Query(per_minute("log_lines_not_stored_total", "level"), "{{level}}"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Traces kept",
                "By chance (`head`), because of an error, or because another process found one (`remote`).",
                Query(per_minute("obs_traces_kept_total", "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
            ),
            timeseries(
                "Spans lost",
                "`export_failed`: the collector is away or refuses. `queue_full`: it is slower than what happens."
                " Otherwise traces with an error are not whole.",
                Query(per_minute("obs_spans_dropped_total", "reason"), "{{reason}}"),
                unit=units.CountsPerMinute,
            ),
        ],
        [
            timeseries(
                "Values masked in logs",
                "A jump means that something new logs what it should not.",
                Query(per_minute("obs_log_redactions_total", "kind"), "{{kind}}"),
                unit=units.CountsPerMinute,
                stacked=True,
            ),
            timeseries(
                "Label values not known",
                "Counted as `other`. A metric that appears here has met something that the program did not expect.",
                Query(per_minute("obs_label_values_rejected_total", "metric"), "{{metric}}"),
                unit=units.CountsPerMinute,
                empty="all known",
            ),
        ],
    ),
    variables=[
        variable("job", "Which kind of process", "label_values(build_info, job)"),
        variable("instance", "Which process", 'label_values(build_info{job=~"$job"}, instance)'),
    ],
)
