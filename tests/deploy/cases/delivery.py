"""Cases of notifications, webhooks and the doorbell."""

from typing import Final

from tests.deploy.cases.case import Case, Firing, Quiet

DELIVERY: Final[tuple[Case, ...]] = (
    Firing(
        "OutboxLag",
        {"outbox_dispatch_lag_seconds": "61+0x20"},
        after=11,
        says="What is due in the outbox has waited for 1m 1s.",
        value="61",
    ),
    Quiet("OutboxLag", {"outbox_dispatch_lag_seconds": "60+0x20"}, after=20),
    Quiet("OutboxLag", {"outbox_dispatch_lag_seconds": "0+60x8 0+0x20"}, after=12),
    Firing(
        "OutboxDead",
        {"outbox_dead": "1+0x10"},
        after=6,
        says="Deliveries that have failed six times, and are not tried any more: 1.",
        value="1",
    ),
    Quiet("OutboxDead", {"outbox_dead": "0+0x10"}, after=10),
    Firing(
        "WebhookDeliveriesFailing",
        {
            'webhook_deliveries_total{result="delivered"}': "9+0x30",
            'webhook_deliveries_total{result="unreachable"}': "0+1x30",
            'webhook_deliveries_total{result="timeout"}': "0+1x30",
        },
        after=20,
        says="All of 30 attempts within a quarter of an hour met no receiver.",
        value="30",
    ),
    # One endpoint is gone, others are not.
    Quiet(
        "WebhookDeliveriesFailing",
        {
            'webhook_deliveries_total{result="delivered"}': "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1",
            'webhook_deliveries_total{result="unreachable"}': "0+9x20",
        },
        after=20,
    ),
    Quiet(
        "WebhookDeliveriesFailing",
        {
            'webhook_deliveries_total{result="delivered"}': "9+0x30",
            'webhook_deliveries_total{result="unreachable"}': "0 0 0 0 0 1 2 3 4 5 6 6 6 6 6 6",
        },
        after=15,
    ),
    Firing(
        "WebhookDestinationForbidden",
        {'webhook_deliveries_total{result="forbidden"}': "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 2 2"},
        after=16,
        says="Deliveries that were not made because of where they led: 2.",
        value="2",
    ),
    Quiet("WebhookDestinationForbidden", {'webhook_deliveries_total{result="rejected"}': "0+2x20"}, after=20),
    Firing(
        "DoorbellFailures",
        {
            'doorbell_failures_total{job="sessiongate-api"}': "0+2x20",
            'doorbell_failures_total{job="sessiongate-worker"}': "0+0x20",
        },
        after=11,
        says="sessiongate-api cannot ring: notifications may be a second late, messages to sockets two.",
        value="10",
        labels=(("job", "sessiongate-api"),),
    ),
    Quiet(
        "DoorbellFailures", {'doorbell_failures_total{job="sessiongate-api"}': "0 0 1 1 1 1 1 1 1 1 1 1 1"}, after=11
    ),
)
