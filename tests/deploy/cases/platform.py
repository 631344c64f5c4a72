"""Cases of processes, the database and what watches both."""

from typing import Final

from tests.deploy.cases.case import Case, Firing, Quiet

PLATFORM: Final[tuple[Case, ...]] = (
    Firing(
        "TargetDown",
        {
            'up{job="sessiongate-worker",instance="worker:9101"}': "1 1 0 0 0 0",
            'up{job="sessiongate-api",instance="api:8000"}': "1+0x5",
        },
        after=4,
        says="sessiongate-worker at worker:9101 tells no metrics.",
        value="0",
        labels=(("job", "sessiongate-worker"), ("instance", "worker:9101")),
    ),
    Quiet("TargetDown", {'up{job="sessiongate-worker",instance="worker:9101"}': "1 1 0 0 1 1 1"}, after=6),
    Firing(
        "ApiMissing",
        {'build_info{service="sessiongate-worker"}': "1+0x10"},
        after=3,
        says="Prometheus knows of no API at all.",
        value="0",
    ),
    Quiet("ApiMissing", {'build_info{service="sessiongate-api"}': "1+0x10"}, after=10),
    Firing(
        "MemoryNearLimit",
        {
            'process_resident_memory_bytes{job="sessiongate-api",instance="api:8000"}': "475+0x20",
            'process_memory_limit_bytes{job="sessiongate-api",instance="api:8000"}': "500+0x20",
        },
        after=12,
        says="api:8000 uses 95% of its memory.",
        value="0.95",
        labels=(("job", "sessiongate-api"), ("instance", "api:8000")),
    ),
    Quiet(
        "MemoryNearLimit",
        {
            'process_resident_memory_bytes{job="sessiongate-api",instance="api:8000"}': "450+0x20",
            'process_memory_limit_bytes{job="sessiongate-api",instance="api:8000"}': "500+0x20",
        },
        after=20,
    ),
    Firing(
        "DbSaturation",
        {
            'db_connections_in_use{pool="api",job="sessiongate-api",instance="api:8000"}': "17+0x20",
            'db_connections_max{pool="api",job="sessiongate-api",instance="api:8000"}': "20+0x20",
        },
        after=11,
        says="85% of the connections of api:8000 are in use.",
        value="0.85",
        labels=(("pool", "api"), ("job", "sessiongate-api"), ("instance", "api:8000")),
    ),
    Quiet(
        "DbSaturation",
        {
            'db_connections_in_use{pool="api",job="sessiongate-api",instance="api:8000"}': "16+0x20",
            'db_connections_max{pool="api",job="sessiongate-api",instance="api:8000"}': "20+0x20",
            'db_connections_in_use{pool="worker",job="sessiongate-api",instance="api:8000"}': "0+0x20",
            'db_connections_max{pool="worker",job="sessiongate-api",instance="api:8000"}': "0+0x20",
        },
        after=20,
    ),
    Firing(
        "DbPoolTimeouts",
        {
            'db_pool_timeouts_total{pool="api",job="sessiongate-api",instance="api:8000"}': "0 0 0 0 0 0 0 3 6 6",
            'db_pool_timeouts_total{pool="worker",job="sessiongate-api",instance="api:8000"}': "0+0x9",
        },
        after=9,
        says="api:8000 waited in vain 6 times within five minutes.",
        value="6",
        labels=(("job", "sessiongate-api"), ("instance", "api:8000")),
    ),
    Quiet(
        "DbPoolTimeouts",
        {'db_pool_timeouts_total{pool="api",job="sessiongate-api",instance="api:8000"}': "0 0 0 0 0 5 5 5"},
        after=7,
    ),
    Firing(
        "AuditViolations",
        {'audit_violations{invariant="ledger_sums_to_zero"}': "3+0x5"},
        after=1,
        says="Rows that violate ledger_sums_to_zero: 3.",
        value="3",
        labels=(("invariant", "ledger_sums_to_zero"),),
    ),
    Quiet("AuditViolations", {'audit_violations{invariant="ledger_sums_to_zero"}': "0+0x5"}, after=5),
    Firing(
        "AuditNotRunning",
        {"audit_last_run_timestamp_seconds": "0+0x120", "audit_interval_seconds": "300+0x120"},
        after=106,
        says="The last audit is an hour older than three intervals between audits, or there was none.",
        value="5460",
    ),
    Quiet(
        "AuditNotRunning",
        {"audit_last_run_timestamp_seconds": "0+60x60 3600+0x60", "audit_interval_seconds": "300+0x120"},
        after=120,
    ),
    # Whoever audits every four hours is not late after three, and whoever does not audit is never late.
    *(
        Quiet(
            "AuditNotRunning",
            {"audit_last_run_timestamp_seconds": "0+0x180", "audit_interval_seconds": f"{interval}+0x180"},
            after=180,
        )
        for interval in (14_400, 0)
    ),
    Firing(
        "GaugesStale",
        {
            'gauges_last_run_timestamp_seconds{instance="a"}': "0+60x5 300+0x20",
            'gauges_last_run_timestamp_seconds{instance="b"}': "0+0x25",
        },
        after=10,
        says="Backlog, outbox and audit were last measured 5m 0s ago: alerts on them are blind.",
        value="300",
    ),
    Quiet(
        "GaugesStale",
        {
            'gauges_last_run_timestamp_seconds{instance="a"}': "0+60x30",
            'gauges_last_run_timestamp_seconds{instance="b"}': "0+0x30",
        },
        after=30,
    ),
    Firing(
        "LogLinesDropped",
        {'obs_log_lines_dropped_total{level="routine",job="sessiongate-api"}': "0 0 0 0 0 0 0 0 0 0 5 5"},
        after=11,
        says="Lines (routine) that sessiongate-api has lost: 5.",
        value="5",
        labels=(("level", "routine"), ("job", "sessiongate-api")),
    ),
    Quiet(
        "LogLinesDropped", {'obs_log_lines_dropped_total{level="routine",job="sessiongate-api"}': "5+0x20"}, after=20
    ),
    Firing(
        "LogLinesNotStored",
        {'log_lines_not_stored_total{level="urgent",job="sessiongate-api"}': "0 0 0 0 0 0 0 0 0 0 5 5"},
        after=11,
        says="Lines that sessiongate-api could not store: 5.",
        value="5",
        labels=(("job", "sessiongate-api"),),
    ),
    Quiet(
        "LogLinesNotStored", {'log_lines_not_stored_total{level="routine",job="sessiongate-api"}': "0+5x20"}, after=20
    ),
    Firing(
        "RuleEvaluationFailing",
        {'prometheus_rule_evaluation_failures_total{job="prometheus",rule_group="alerts.yml;platform"}': "0 0 0 1 2"},
        after=4,
        says="Rules of alerts.yml;platform fail: their alerts are silent, whatever happens.",
        value="2",
        labels=(("rule_group", "alerts.yml;platform"),),
    ),
    Quiet(
        "RuleEvaluationFailing",
        {'prometheus_rule_evaluation_failures_total{job="prometheus",rule_group="alerts.yml;platform"}': "3+0x20"},
        after=20,
    ),
    Firing(
        "NotificationsDropped",
        {'prometheus_notifications_dropped_total{job="prometheus"}': "0 0 0 3 3"},
        after=4,
        says="Alerts that no Alertmanager took: 3.",
        value="3",
    ),
    Quiet("NotificationsDropped", {'prometheus_notifications_dropped_total{job="prometheus"}': "3+0x20"}, after=20),
    Firing(
        "Watchdog",
        {},
        after=0,
        says="This one always fires. When it does not, Prometheus or Alertmanager is down.",
        value="1",
    ),
    Firing(
        "AlertDeliveryFailing",
        {'alertmanager_notifications_failed_total{job="alertmanager",integration="webhook"}': "2+0x9 4 4"},
        after=11,
        says="Attempts to tell a webhook that have failed: 2.",
        value="2",
        labels=(("integration", "webhook"),),
    ),
    Quiet(
        "AlertDeliveryFailing",
        {'alertmanager_notifications_failed_total{job="alertmanager",integration="webhook"}': "2+0x20"},
        after=20,
    ),
)
