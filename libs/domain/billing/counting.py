"""What charging does to the metrics, once it is committed."""

from collections.abc import Iterable, Mapping
from typing import Any

from libs.observability.registry import Metrics


def count(metrics: Metrics, modality: str, units: int, payouts: Iterable[Mapping[str, Any]]) -> None:
    """Adds the units charged for one session or appointment, and what the doctor got for them."""
    metrics.counter("billing_units_charged_total", modality).inc(units)
    for payout in payouts:
        metrics.counter("billing_payout_minor_total", payout["currency"]).inc(payout["amount_minor"])
