"""Settling sessions: charging what has run, ending what is over, warning of what soon will be.

One statement does it for the worker's tick, for a charge in between and for an end that somebody asks for,
so the charge, the payout, the counter, the state of session and appointment and the events are stored together
or not at all. All timers are rows: nothing is kept in memory, and a worker that was away catches up. It
charges nothing for the time between the moment a session was over and the moment that was noticed.
"""

import time
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from libs.domain.billing.counting import count
from libs.domain.billing.posting import CHARGE_SESSIONS, UNIT_SQL, elapsed_units
from libs.domain.conversion.unblocking import unblock
from libs.domain.jobs import DispatchOutbox
from libs.domain.outbox.events import LANES, EventName, deliver
from libs.domain.sessions.facts import FORSAKEN_AT, OVERDUE, UNANSWERED
from libs.domain.tables import BEGUN_AT, LIVE
from libs.domain.telemetry import logger
from libs.domain.transaction import Transaction
from libs.guardrails import SessionStatus
from libs.observability.context import carrier
from libs.observability.registry import Metrics
from libs.observability.tracing import exemplar, span

_log: Final = logger("sessions")
_billing_log: Final = logger("billing")

SETTLED_AT_ONCE: Final = 500
"""At most so many sessions are settled by one statement."""

_WARNING: Final = "interval '1 minute'"

_DUE: Final = f"""
    (SELECT id FROM sessions s WHERE {UNANSWERED} ORDER BY least(s.response_deadline, s.expires_at) LIMIT :limit)
    UNION ALL
    (SELECT id FROM sessions WHERE status = 'active' AND tick_at <= clock() ORDER BY tick_at LIMIT :limit)
"""
_SELECT_DUE: Final = text(_DUE)
# A conversion may hold an appointment whose session is over: that one can wait for the next beat.
_LOCK_DUE: Final = text(
    f"""
    WITH candidate AS MATERIALIZED (
        SELECT id, appointment_id FROM sessions WHERE id IN (SELECT id FROM ({_DUE}) AS due)
        ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
    ),
    free AS MATERIALIZED (
        SELECT id FROM appointments WHERE id IN (SELECT appointment_id FROM candidate) FOR UPDATE SKIP LOCKED
    )
    SELECT id FROM candidate WHERE appointment_id IS NULL OR appointment_id IN (SELECT id FROM free)
    """
)
LOCK_ONE: Final = text("SELECT id FROM sessions WHERE id = :id FOR NO KEY UPDATE")
_LOCK_FREE: Final = text("SELECT id FROM sessions WHERE id = :id FOR NO KEY UPDATE SKIP LOCKED")

# :ids sessions, whose rows an earlier statement has locked, so that this one sees their last message;
# :verb what somebody asks for: null, 'end' or 'decline'; :words why, in a person's words, which stay in the session.
SETTLE: Final = text(
    f"""
    WITH judged AS MATERIALIZED (
        SELECT s.*, {BEGUN_AT} AS begun_at, s.units_charged AS charged, s.status <> 'active' AS unanswered,
            {OVERDUE} AS over, CAST(:verb AS text) AS verb
        FROM sessions s WHERE s.id = ANY (:ids) AND {LIVE}
    ),
    billed AS (
        SELECT *, least(allowance_units, {elapsed_units("begun_at", "least(clock(), expires_at, idle_at)")}
            -- Whoever ends a session pays for the unit that has begun; one that ends by itself has none.
            + CASE WHEN verb = 'end' AND NOT over THEN 1 ELSE 0 END) AS wanted
        FROM judged WHERE begun_at IS NOT NULL
    ),
    {CHARGE_SESSIONS},
    outcome AS MATERIALIZED (
        SELECT j.*, c.id AS conversation_id, c.last_seq, verdict.*, coalesce(charged.added, 0) AS added,
            j.charged + coalesce(charged.added, 0) AS units, coalesce(charged.payouts, '[]') AS payouts,
            verdict.next = 'active' AND j.begun_at IS NOT NULL AND j.warned_at IS NULL
                AND j.expires_at - {_WARNING} <= clock() AS warns
        FROM judged j
        JOIN conversations c ON c.session_id = j.id
        LEFT JOIN billed b ON b.id = j.id
        LEFT JOIN charged ON charged.id = j.id
        CROSS JOIN LATERAL (
            -- When others have used up the units meanwhile, the allowance is spent early.
            SELECT coalesce(b.wanted > j.charged + coalesce(charged.added, 0), false) AS short
        ) AS stock
        CROSS JOIN LATERAL (
            SELECT CASE
                    WHEN j.over AND j.unanswered THEN CASE j.kind WHEN 'text' THEN 'expired' ELSE 'missed' END
                    WHEN j.over OR j.verb = 'end' THEN 'ended'
                    WHEN j.verb = 'decline' THEN 'declined'
                    WHEN stock.short THEN 'ended'
                    ELSE j.status END AS next,
                CASE
                    WHEN j.over AND j.unanswered THEN 'deadline'
                    WHEN j.over AND j.expires_at > clock() THEN 'inactivity'
                    WHEN j.over AND j.begun_at IS NULL THEN 'never_connected'
                    WHEN j.over THEN 'allowance_spent'
                    WHEN j.verb IS NOT NULL THEN CAST(:reason AS text)
                    WHEN stock.short THEN 'allowance_spent' END AS because
        ) AS verdict
    ),
    settled AS (
        UPDATE sessions s
        SET status = o.next, units_charged = o.units,
            ended_at = CASE WHEN o.because IS NOT NULL THEN clock() END,
            ended_seq = CASE WHEN o.because IS NOT NULL THEN o.last_seq END,
            ended_by = CASE WHEN o.because IS NOT NULL AND NOT o.over THEN CAST(:ended_by AS bigint) END,
            end_reason = CASE WHEN o.over THEN o.because ELSE coalesce(CAST(:words AS text), o.because) END,
            warned_at = CASE WHEN o.warns THEN clock() ELSE s.warned_at END,
            tick_at = CASE WHEN o.next = 'active' THEN least(
                s.expires_at, {FORSAKEN_AT},
                -- A unit that would be full only after the session went idle never will be.
                CASE WHEN s.idle_at IS NULL OR o.begun_at + (o.units + 1) * {UNIT_SQL} <= s.idle_at
                    THEN o.begun_at + (o.units + 1) * {UNIT_SQL} END,
                CASE WHEN o.begun_at IS NOT NULL AND NOT o.warns AND s.warned_at IS NULL
                    THEN s.expires_at - {_WARNING} END
            ) END
        FROM outcome o WHERE s.id = o.id
    ),
    concluded AS (
        UPDATE appointments a
        SET status = CASE o.next WHEN 'ended' THEN 'COMPLETED' ELSE 'NO_SHOW' END, updated_at = clock()
        FROM outcome o WHERE a.id = o.appointment_id AND a.status = 'IN_PROGRESS' AND o.because IS NOT NULL
    ),
    event AS (
        INSERT INTO outbox_events (tenant_id, name, aggregate, payload, correlation_id, trace_context)
        SELECT o.tenant_id, happened.name, coalesce('appointment:' || o.appointment_id, 'session:' || o.id),
            jsonb_build_object('appointment_id', o.appointment_id, 'session_id', o.id, 'modality', o.modality,
                'session_context', o.kind || '_session:' || o.id, 'end_reason', o.because,
                'patient_id', o.patient_id, 'doctor_id', o.doctor_id,
                'units_charged', o.units, 'units_added', o.added, 'payouts', o.payouts),
            CAST(:carrier AS jsonb) ->> 'correlation_id', CAST(:carrier AS jsonb)
        FROM outcome o
        CROSS JOIN LATERAL (VALUES
            (1, '{EventName.SESSION_CHARGED}', o.added > 0),
            (2, '{EventName.SESSION_ENDING_SOON}', o.warns),
            (3, '{EventName.SESSION_ENDED}', o.because IS NOT NULL)
        ) AS happened (rank, name, did)
        WHERE happened.did
        ORDER BY o.id, happened.rank
        RETURNING id, tenant_id, name, aggregate
    ),
    delivery AS ({deliver(f"'{LANES[EventName.SESSION_ENDED]}'")})
    SELECT id, tenant_id, appointment_id, patient_id, doctor_id, conversation_id, modality, next, because,
        units, added, payouts, warns, last_seq,
        extract(epoch FROM clock() - coalesce(begun_at, created_at))::float8 AS lasted
    FROM outcome ORDER BY id
    """
).bindparams(bindparam("carrier", type_=JSONB))


@dataclass(frozen=True, slots=True)
class Payout:
    """What a doctor earned, in the minor unit of the currency."""

    amount_minor: int
    currency: str


@dataclass(frozen=True, slots=True)
class Settled:
    """What settling did to one session: `units_added` and `payouts` are of this settlement alone; `end_reason`
    is None while it goes on."""

    session_id: int
    status: SessionStatus
    units_charged: int
    units_added: int
    payouts: tuple[Payout, ...]
    end_reason: str | None


@dataclass(frozen=True, slots=True)
class Ending:
    """What somebody asks for: to `end` a session, or to `decline` a call. `reason` is ours to tell; `words` are the
    person's own, which only the session's parties see."""

    verb: str
    by: int
    reason: str
    words: str | None = None


class Settlement:
    """The one way in which sessions are charged and end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def due(self, tx: Transaction) -> list[Settled]:
        """Settles the sessions that are due and that nobody else holds, at most `SETTLED_AT_ONCE` of each kind."""
        ids = (await tx.execute(_LOCK_DUE, {"limit": SETTLED_AT_ONCE})).scalars().all()
        return await self._settle(tx, list(ids)) if ids else []

    async def one(self, tx: Transaction, session_id: int, ending: Ending | None = None) -> Settled | None:
        """Settles this session as of now, and ends it if asked to. None when it was over before."""
        await tx.execute(LOCK_ONE, {"id": session_id})
        settled = await self._settle(tx, [session_id], ending)
        return settled[0] if settled else None

    async def free(self, tx: Transaction, session_id: int) -> None:
        """Settles this session as of now, unless somebody holds it."""
        if (await tx.execute(_LOCK_FREE, {"id": session_id})).one_or_none():
            await self._settle(tx, [session_id])

    async def _settle(self, tx: Transaction, ids: list[int], ending: Ending | None = None) -> list[Settled]:
        began = time.perf_counter()
        with span("billing.settle"):
            parameters = {
                "ids": ids,
                "verb": ending and ending.verb,
                "reason": ending and ending.reason,
                "words": ending and ending.words,
                "ended_by": ending and ending.by,
                "carrier": carrier() if ending else {},
            }
            rows = (await tx.execute(SETTLE, parameters)).all()
            over = [row for row in rows if row.because is not None]
            if over:
                await unblock(
                    tx, [user for row in over for user in (row.patient_id, row.doctor_id)], session_ended=True
                )
        for row in rows:
            if row.because or row.added or row.warns:
                tx.ring(DispatchOutbox())
                tx.changed(row.conversation_id)
        tx.after_commit(lambda: self._tell(rows, ending, time.perf_counter() - began))
        return [_settled(row) for row in rows]

    def _tell(self, rows: Any, ending: Ending | None, seconds: float) -> None:
        metrics = self._metrics
        metrics.histogram("settlement_duration_seconds").observe(seconds, exemplar())
        for row in rows:
            if row.added:
                count(metrics, row.modality, row.added, row.payouts)
                _billing_log.info(
                    "session_charged",
                    tenant_id=row.tenant_id,
                    session_id=row.id,
                    appointment_id=row.appointment_id,
                    units_added=row.added,
                    units_charged=row.units,
                )
            if row.because:
                metrics.histogram("chat_session_duration_seconds", row.modality).observe(row.lasted)
                metrics.histogram("chat_session_messages").observe(row.last_seq)
                _log.info(
                    "session_state_changed",
                    tenant_id=row.tenant_id,
                    session_id=row.id,
                    appointment_id=row.appointment_id,
                    status=row.next,
                    end_reason=row.because,
                    user_id=ending.by if ending else None,
                )


async def due_sessions(tx: Transaction) -> list[int]:
    """The ids of the sessions that are due, held by somebody or not."""
    return list((await tx.execute(_SELECT_DUE, {"limit": SETTLED_AT_ONCE})).scalars())


def _settled(row: Any) -> Settled:
    payouts = tuple(Payout(**payout) for payout in row.payouts)
    return Settled(row.id, SessionStatus(row.next), row.units, row.added, payouts, row.because)
