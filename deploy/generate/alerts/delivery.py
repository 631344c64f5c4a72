"""What nobody hears of: notifications, webhooks, and wake-up calls."""

from typing import Final

from libs.observability.rules import Alert

DELIVERY: Final = (
    Alert(
        name="OutboxLag",
        expr="max(outbox_dispatch_lag_seconds) > 60",
        lasting="10m",
        severity="critical",
        component="outbox",
        metric="outbox_dispatch_lag_seconds",
        summary="Notifications are late",
        description="What is due in the outbox has waited for {{ $value | humanizeDuration }}.",
        runbook="docs/runbooks/outbox.md",
    ),
    Alert(
        name="OutboxDead",
        expr="max(outbox_dead) > 0",
        lasting="5m",
        severity="high",
        component="outbox",
        metric="outbox_dead",
        summary="Notifications were given up",
        description="Deliveries that have failed six times, and are not tried any more: {{ $value }}.",
        runbook="docs/runbooks/outbox.md",
    ),
    Alert(
        name="WebhookDeliveriesFailing",
        expr='sum(increase(webhook_deliveries_total{result=~"timeout|unreachable"}[15m])) > 10\n'
        'and\nsum(increase(webhook_deliveries_total{result!~"timeout|unreachable"}[15m])) == 0',
        severity="high",
        component="webhooks",
        metric="webhook_deliveries_total",
        summary="No webhook endpoint that was tried can be reached",
        description='All of {{ $value | printf "%.0f" }} attempts within a quarter of an hour met no receiver.',
        runbook="docs/runbooks/webhooks.md",
    ),
    Alert(
        name="WebhookDestinationForbidden",
        expr='sum(increase(webhook_deliveries_total{result="forbidden"}[15m])) > 0',
        severity="warning",
        component="webhooks",
        metric="webhook_deliveries_total",
        summary="A webhook endpoint leads into a network that is not public",
        description='Deliveries that were not made because of where they led: {{ $value | printf "%.0f" }}.',
        runbook="docs/runbooks/webhooks.md",
    ),
    Alert(
        name="DoorbellFailures",
        expr="sum by (job) (increase(doorbell_failures_total[5m])) > 0",
        lasting="5m",
        severity="warning",
        component="doorbell",
        metric="doorbell_failures_total",
        summary="Redis does not take wake-up calls",
        description="{{ $labels.job }} cannot ring: notifications may be a second late, messages to sockets two.",
        runbook="docs/runbooks/redis.md",
    ),
)
