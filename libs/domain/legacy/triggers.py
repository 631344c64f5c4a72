"""What older installations do to appointments by the clock, until everything is a session.

Both commands leave alone what has a session, and the tenants for which the flag disables them. Conversion gives
nearly every appointment its session when it is due, so only what it never tried is left to be closed.
"""

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import text

from libs.domain.appointments.transitions import Status
from libs.domain.billing.closing import CHARGED, close, closing
from libs.domain.conversion.runs import Converter, Run
from libs.domain.db import Database, is_transient
from libs.domain.jobs import DispatchOutbox
from libs.domain.legacy.commands import Command
from libs.domain.tables import BACKLOG
from libs.domain.telemetry import logger
from libs.domain.transaction import Bell, transaction
from libs.guardrails import Flag, FlagSource
from libs.observability.registry import Metrics
from libs.observability.tracing import span

_log: Final = logger("legacy")

PROCESSED_AT_ONCE: Final = 1000
"""At most so many appointments are closed by one run."""

_TENANTS: Final = "SELECT id FROM tenants ORDER BY id"

_OVER: Final = f"{BACKLOG} AND ends_at <= clock() AND conversion_attempts = 0"
# An attempt at a row that the database lets nobody change is written down beside it alone.
_SELECT_OVER: Final = f"""
    SELECT id FROM appointments a
    WHERE {_OVER} AND NOT EXISTS (SELECT FROM conversion_attempts tried WHERE tried.appointment_id = a.id)
      AND tenant_id <> ALL ($1::bigint[])
    ORDER BY starts_at, id
    LIMIT {PROCESSED_AT_ONCE}
"""
_PROCESS: Final = closing(
    f"""
    SELECT *, greatest(charged, CASE next WHEN '{Status.CANCELLED}' THEN 0 ELSE 1 END) AS wanted
    FROM (
        SELECT a.id, a.tenant_id, a.patient_id, a.doctor_id, a.modality, a.starts_at AS begun_at,
            {CHARGED} AS charged, a.patient_present_at IS NOT NULL AS pays, true AS ends,
            CASE WHEN a.doctor_present_at IS NULL THEN '{Status.CANCELLED}'
                WHEN a.patient_present_at IS NULL THEN '{Status.NO_SHOW}'
                ELSE '{Status.COMPLETED}' END AS next
        FROM appointments a WHERE a.id = :id AND {_OVER}
        FOR UPDATE SKIP LOCKED
    ) AS judged
    """
)
_HAS_SESSION: Final = text("SELECT EXISTS (SELECT FROM sessions WHERE appointment_id = :id)")


@dataclass(slots=True)
class TriggerRun:
    """One run of a command. `disabled_tenants` were left alone; of the others' appointments, `skipped` had changed
    once they were locked, were held by somebody, or could not start early."""

    command: Command
    disabled_tenants: int
    disabled: bool
    job_run_id: UUID
    processed: int = 0
    skipped: int = 0

    def fields(self) -> dict[str, Any]:
        return {
            "command_name": self.command.value,
            "processed": self.processed,
            "skipped": self.skipped,
            "job_run_id": str(self.job_run_id),
            "disabled_tenants": self.disabled_tenants,
        }


class Triggers:
    """The two commands, on behalf of one process. That they are disabled is told by the first run, and again when
    it is for other tenants."""

    def __init__(
        self, database: Database, bell: Bell, flags: FlagSource, metrics: Metrics, converter: Converter
    ) -> None:
        self._database = database
        self._bell = bell
        self._flags = flags
        self._metrics = metrics
        self._converter = converter
        self._told: dict[Command, list[int]] = {}

    async def process_appointment_sessions(self) -> TriggerRun:
        """Closes what is over and had neither a session nor a conversion: for an absent doctor it is cancelled; for
        an absent patient it costs a unit, of which the doctor gets nothing; otherwise it is completed and paid."""
        run, disabled = await self._begin(Command.PROCESS_APPOINTMENT_SESSIONS)
        if not run.disabled:
            with span("legacy.process_appointment_sessions", root=True):
                try:
                    async with self._database.autocommit() as connection:
                        selected = await connection.fetch(_SELECT_OVER, disabled)
                    for row in selected:
                        await self._process(run, row["id"])
                finally:
                    self._finish(run)
        return run

    async def activate_booked_appointments(self) -> TriggerRun:
        """Starts the sessions of text appointments five minutes early, as conversion does when they are due."""
        run, disabled = await self._begin(Command.ACTIVATE_BOOKED_APPOINTMENTS)
        if not run.disabled:
            converted = Run("legacy", run_id=run.job_run_id)
            try:
                await self._converter.activate_early(converted, except_tenants=disabled)
            finally:
                run.processed, run.skipped = converted.created_count, converted.skipped_count + converted.failed_count
                self._count(run.command, converted.created_count, has_session=False)
                if converted.created_count:
                    self._bell.ring(DispatchOutbox())
                self._finish(run)
        return run

    async def _process(self, run: TriggerRun, appointment_id: int) -> None:
        """One transaction each: what the database refuses holds up nothing else. What can be tried again is raised."""
        try:
            async with transaction(self._database, self._bell) as tx:
                closed = await close(tx, self._metrics, _PROCESS, {"id": appointment_id})
                has_session = (await tx.execute(_HAS_SESSION, {"id": appointment_id})).scalar_one()
        except Exception as error:
            _log.error(
                "legacy_trigger_failed",
                exc_info=error,
                appointment_id=appointment_id,
                exception_type=type(error).__name__,
            )
            if is_transient(error):
                raise
            closed = None
        if closed is None:
            run.skipped += 1
            return
        run.processed += 1
        self._count(run.command, 1, has_session=has_session)

    async def _begin(self, command: Command) -> tuple[TriggerRun, list[int]]:
        """A new run, and the tenants that it leaves alone."""
        async with self._database.autocommit() as connection:
            tenants = [row["id"] for row in await connection.fetch(_TENANTS)]
        flag = Flag.DISABLE_LEGACY_APPOINTMENT_TRIGGERS
        disabled = [tenant for tenant in tenants if self._flags.for_tenant(tenant)[flag]]
        if disabled and self._told.get(command) != disabled:
            _log.info(
                "legacy_triggers_disabled",
                message="Legacy appointment triggers disabled",
                command_name=command.value,
                disabled_tenants=len(disabled),
                tenants=len(tenants),
            )
        self._told[command] = disabled
        is_disabled = bool(disabled) and len(disabled) == len(tenants)
        return TriggerRun(command, len(disabled), is_disabled, uuid4()), disabled

    def _count(self, command: Command, processed: int, *, has_session: bool) -> None:
        counter = self._metrics.counter(
            "legacy_trigger_appointments_processed_total", command.value, "true" if has_session else "false"
        )
        counter.inc(processed)

    def _finish(self, run: TriggerRun) -> None:
        self._metrics.counter("legacy_trigger_executions_total", run.command.value).inc()
        _log.info(
            "legacy_trigger_run",
            command_name=run.command.value,
            processed=run.processed,
            skipped=run.skipped,
            job_run_id=str(run.job_run_id),
            disabled_tenants=run.disabled_tenants,
        )
