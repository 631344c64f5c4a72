"""Tripwires: a flag that refuses too much of what arrives goes back to off by itself.

What arrives is read from `decision_totals`, to which every process adds, minute by minute. The minute in which an
override was changed counts from its beginning, so that a tripwire is alert from the first request on.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import BigInteger, Interval, Text

from libs.domain.flags import overrides
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction
from libs.guardrails import ENFORCES, Flags, Override, Rollout, Target
from libs.guardrails.operations import names_of
from libs.observability.registry import Metrics

_log: Final = logger("flags")

_TRAFFIC: Final = text("""
    SELECT t.tenant_id, sum(t.requests)::bigint AS requests,
        coalesce(sum(t.requests) FILTER (WHERE t.verdict = 'refused' AND t.flag = o.flag), 0)::bigint AS refused
    FROM flag_overrides o JOIN decision_totals t
        ON t.minute > clock() - :window AND t.minute >= date_trunc('minute', o.changed_at)
        AND t.operation = ANY(:operations)
    WHERE o.flag = :flag AND o.tenant_id IS NOT DISTINCT FROM :tenant_id
    GROUP BY t.tenant_id
""").bindparams(
    bindparam("window", type_=Interval),
    bindparam("operations", type_=ARRAY(Text)),
    bindparam("tenant_id", type_=BigInteger),
)


@dataclass(frozen=True, slots=True)
class Trip:
    """A tripwire that was crossed, and by how many of how many requests."""

    override: Override
    requests: int
    refused: int

    def tell(self, metrics: Metrics) -> None:
        """Counts and logs it; to be done once it is committed."""
        flag = self.override.flag.value
        metrics.counter("flag_tripwire_total", flag).inc()
        _log.error(
            "flag_tripped", flag=flag, tenant_id=self.override.tenant_id, requests=self.requests, refused=self.refused
        )


async def trip(tx: Transaction) -> list[Trip]:
    """Turns every flag off whose tripwire is crossed. Rows that another worker is judging are left to it."""
    armed = await overrides.lock_armed(tx)
    if not armed:
        return []
    rollout = Rollout.of(Flags(), await overrides.all_of(tx))
    tripped = []
    for override in armed:
        requests, refused = await _traffic(tx, override, rollout)
        if override.tripwire and override.tripwire.is_crossed(requests, refused):
            off = Override(override.flag, override.tenant_id, Target(default=False))
            await overrides.store(tx, off)
            await overrides.note(
                tx, "flag_tripped", override, before=override, after=off, requests=requests, refused=refused
            )
            tripped.append(Trip(override, requests, refused))
    return tripped


async def _traffic(tx: Transaction, override: Override, rollout: Rollout) -> tuple[int, int]:
    """How many requests came, and how many of them the flag refused, in the tenants that this override has it on
    for: a share that refuses everything must not hide behind the tenants it does not reach."""
    assert override.tripwire
    parameters = {
        "flag": override.flag.value,
        "tenant_id": override.tenant_id,
        "window": timedelta(minutes=override.tripwire.minutes),
        "operations": names_of(ENFORCES[override.flag]),
    }
    requests = refused = 0
    for row in (await tx.execute(_TRAFFIC, parameters)).all():
        value = rollout.value(override.flag, row.tenant_id)
        if value.enabled and value.override == override:
            requests += row.requests
            refused += row.refused
    return requests, refused
