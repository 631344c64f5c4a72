"""Processes, the database, and what watches both."""

from typing import Final

from libs.observability.rules import Alert

PLATFORM: Final = (
    Alert(
        name="TargetDown",
        expr="up == 0",
        lasting="2m",
        severity="critical",
        component="process",
        metric="up",
        summary="A process does not answer",
        description="{{ $labels.job }} at {{ $labels.instance }} tells no metrics.",
        runbook="docs/runbooks/target-down.md",
    ),
    Alert(
        name="ApiMissing",
        # Where targets are discovered, one that has gone is none that is down.
        expr='(count(build_info{service="sessiongate-api"}) or vector(0)) == 0',
        lasting="2m",
        severity="critical",
        component="process",
        metric="build_info",
        summary="There is no API",
        description="Prometheus knows of no API at all.",
        runbook="docs/runbooks/target-down.md",
    ),
    Alert(
        name="MemoryNearLimit",
        expr="process_resident_memory_bytes / process_memory_limit_bytes > 0.9",
        lasting="10m",
        severity="high",
        component="process",
        metric="process_resident_memory_bytes",
        summary="A process may be killed for want of memory",
        description="{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its memory.",
        runbook="docs/runbooks/target-down.md",
    ),
    Alert(
        name="DbSaturation",
        expr="db_connections_in_use / db_connections_max > 0.8",
        lasting="10m",
        severity="critical",
        component="database",
        metric="db_connections_in_use",
        summary="Database connections run out",
        description="{{ $value | humanizePercentage }} of the connections of {{ $labels.instance }} are in use.",
        runbook="docs/runbooks/database.md",
    ),
    Alert(
        # A process has two pools, of which one may be empty while half of all connections are free.
        name="DbPoolTimeouts",
        expr="sum by (job, instance) (increase(db_pool_timeouts_total[5m])) > 5",
        severity="high",
        component="database",
        metric="db_pool_timeouts_total",
        summary="Requests find no database connection",
        description='{{ $labels.instance }} waited in vain {{ $value | printf "%.0f" }} times within five minutes.',
        runbook="docs/runbooks/database.md",
    ),
    Alert(
        name="AuditViolations",
        expr="max by (invariant) (audit_violations) > 0",
        severity="critical",
        component="audit",
        metric="audit_violations",
        summary="Rows violate what must always be true",
        description="Rows that violate {{ $labels.invariant }}: {{ $value }}.",
        runbook="docs/runbooks/audit.md",
    ),
    Alert(
        name="AuditNotRunning",
        # After an audit that took long its worker rests nine times as long; hence the hour.
        expr="time() - max(audit_last_run_timestamp_seconds) - 3 * max(audit_interval_seconds) > 3600\n"
        "and\nmax(audit_interval_seconds) > 0",
        lasting="30m",
        severity="warning",
        component="audit",
        metric="audit_last_run_timestamp_seconds",
        summary="Nobody audits the database",
        description="The last audit is an hour older than three intervals between audits, or there was none.",
        runbook="docs/runbooks/audit.md",
    ),
    Alert(
        name="GaugesStale",
        expr="time() - max(gauges_last_run_timestamp_seconds) > 120",
        lasting="2m",
        severity="critical",
        component="telemetry",
        metric="gauges_last_run_timestamp_seconds",
        summary="Nobody knows how the database is doing",
        description="Backlog, outbox and audit were last measured {{ $value | humanizeDuration }} ago: alerts on them"
        " are blind.",
        runbook="docs/runbooks/database.md",
    ),
    Alert(
        name="LogLinesDropped",
        expr="sum by (level, job) (increase(obs_log_lines_dropped_total[10m])) > 0",
        severity="warning",
        component="telemetry",
        metric="obs_log_lines_dropped_total",
        summary="Log lines are lost",
        description='Lines ({{ $labels.level }}) that {{ $labels.job }} has lost: {{ $value | printf "%.0f" }}.',
        runbook="docs/runbooks/lost-records.md",
    ),
    Alert(
        name="LogLinesNotStored",
        # Of the others there may be more than are meant to be searched.
        expr='sum by (job) (increase(log_lines_not_stored_total{level="urgent"}[10m])) > 0',
        severity="info",
        component="telemetry",
        metric="log_lines_not_stored_total",
        summary="Warnings and errors are in the log, but cannot be searched",
        description='Lines that {{ $labels.job }} could not store: {{ $value | printf "%.0f" }}.',
        runbook="docs/runbooks/lost-records.md",
    ),
    Alert(
        name="RuleEvaluationFailing",
        expr="sum by (rule_group)"
        ' (increase(prometheus_rule_evaluation_failures_total{job=~".*prometheus.*"}[10m])) > 0',
        severity="high",
        component="telemetry",
        metric="prometheus_rule_evaluation_failures_total",
        summary="Prometheus cannot evaluate its rules",
        description="Rules of {{ $labels.rule_group }} fail: their alerts are silent, whatever happens.",
        runbook="docs/runbooks/alert-delivery.md",
    ),
    Alert(
        name="NotificationsDropped",
        expr='sum(increase(prometheus_notifications_dropped_total{job=~".*prometheus.*"}[10m])) > 0',
        severity="high",
        component="telemetry",
        metric="prometheus_notifications_dropped_total",
        summary="Prometheus cannot tell Alertmanager",
        description='Alerts that no Alertmanager took: {{ $value | printf "%.0f" }}.',
        runbook="docs/runbooks/alert-delivery.md",
    ),
    Alert(
        # Always there: whoever stops hearing it knows that alerts do not arrive.
        name="Watchdog",
        expr="vector(1) == 1",
        severity="info",
        component="telemetry",
        metric="up",
        summary="Alerts arrive",
        description="This one always fires. When it does not, Prometheus or Alertmanager is down.",
        runbook="docs/runbooks/alert-delivery.md",
    ),
    Alert(
        name="AlertDeliveryFailing",
        expr="sum by (integration)"
        ' (increase(alertmanager_notifications_failed_total{job=~".*alertmanager.*"}[10m])) > 0',
        # Both receivers are told: one of them is likely to be well.
        severity="critical",
        component="telemetry",
        metric="alertmanager_notifications_failed_total",
        summary="Alerts do not reach their receivers",
        description='Attempts to tell a {{ $labels.integration }} that have failed: {{ $value | printf "%.0f" }}.',
        runbook="docs/runbooks/alert-delivery.md",
    ),
)
