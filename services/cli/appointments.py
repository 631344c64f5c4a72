"""`sessiongate appointments …`: running, repairing and watching conversion by hand."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from libs.domain.conversion import monitor
from libs.domain.conversion.report import Reporter
from libs.domain.conversion.runs import Converter, Outcome, Run
from libs.domain.flags.live import LiveFlags
from libs.domain.legacy.triggers import TriggerRun, Triggers
from libs.domain.runtime import flags_of, telemetry, thresholds_of
from libs.domain.settings import Settings
from services.cli import home
from services.cli.database import opened
from services.cli.errors import CommandError
from services.cli.options import AsJson
from services.cli.progress import progress_bar
from services.cli.seed import Silence

app = typer.Typer(
    no_args_is_help=True,
    help="Convert due appointments into sessions, and watch it happen; and what came before sessions.",
)

_EXIT: Final = {"ok": 0, "warning": 1, "critical": 2}
_COLOURS: Final = {"ok": "green", "warning": "yellow", "critical": "red"}
_LOOKBACK: Final = re.compile(r"(\d{1,6})([hd]?)")
_WORKER: Final = "command line"


@app.command("auto-start-sessions")
def auto_start_sessions(
    limit: Annotated[int | None, typer.Option(min=1, help="Convert at most so many.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="List each appointment.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert everything that is due, now."""

    async def convert() -> tuple[Run, list[Outcome]]:
        async with _converting(as_json) as (converter, outcomes, reporter):
            run = await converter.auto_start(limit=limit, wait=True)
            reporter.finished(run)
            return run, outcomes

    run, outcomes = asyncio.run(convert())
    _show_run(run, outcomes if verbose or as_json else [], as_json, dry_run=False)


@app.command("recover-sessions")
def recover_sessions(
    lookback: Annotated[str, typer.Option(help="How long ago they may have become due: 24h, 7d, or all.")] = "24h",
    limit: Annotated[int, typer.Option(min=1, help="Take at most so many.")] = 100,
    execute: Annotated[
        bool, typer.Option("--execute", help="Do it. Without this, only say what would be done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert what was due and was left behind, parked appointments included."""
    reach = _parse_lookback(lookback)

    async def recover() -> tuple[Run, list[Outcome]]:
        async with _converting(as_json) as (converter, outcomes, reporter):
            if execute:
                run = await converter.recover(lookback=reach, limit=limit)
            else:
                began = time.perf_counter()
                outcomes += await converter.foresee(lookback=reach, limit=limit)
                run = Run("recovery", len(outcomes))
                run.add(outcomes)
                run.runtime_ms = (time.perf_counter() - began) * 1000
            reporter.finished(run, dry_run=not execute)
            return run, outcomes

    run, outcomes = asyncio.run(recover())
    _show_run(run, outcomes, as_json, dry_run=not execute)
    if not execute and not as_json:
        Console().print("Nothing was changed. Add [bold]--execute[/bold] to do it.")


@app.command("monitor-sessions")
def monitor_sessions(
    as_json: AsJson = False,
    alert: Annotated[bool, typer.Option("--alert", help="Exit with 1 on a warning, with 2 when critical.")] = False,
    backlog_warning: Annotated[int | None, typer.Option(min=1, help="Due appointments that warn.")] = None,
    backlog_critical: Annotated[int | None, typer.Option(min=1, help="Due appointments that are critical.")] = None,
    backlog_window: Annotated[int | None, typer.Option(min=1, help="For so many seconds.")] = None,
    error_warning: Annotated[float | None, typer.Option(min=0, max=1, help="Failed share that warns.")] = None,
    error_warning_window: Annotated[int | None, typer.Option(min=1, help="Over so many seconds.")] = None,
    error_critical: Annotated[float | None, typer.Option(min=0, max=1, help="Failed share that is critical.")] = None,
    error_critical_window: Annotated[int | None, typer.Option(min=1, help="Over so many seconds.")] = None,
) -> None:
    """Say how conversion is doing, all from the database. Thresholds default to the settings."""
    settings = home.settings(Settings)
    given = {
        "backlog_warning": backlog_warning,
        "backlog_critical": backlog_critical,
        "backlog_window": backlog_window,
        "error_warning": error_warning,
        "error_warning_window": error_warning_window,
        "error_critical": error_critical,
        "error_critical_window": error_critical_window,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    thresholds = replace(thresholds_of(settings), **chosen)

    async def ask() -> monitor.Report:
        async with opened(settings) as database:
            return await monitor.report(database, thresholds)

    report = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps(report.fields()))
    else:
        _show_report(report)
    if alert:
        raise typer.Exit(_EXIT[report.level])


@app.command("process-appointment-sessions")
def process_appointment_sessions(as_json: AsJson = False) -> None:
    """Legacy: close appointments that are over and had neither a session nor a conversion, and bill them."""
    _trigger(Triggers.process_appointment_sessions, as_json)


@app.command("activate-booked-appointments")
def activate_booked_appointments(as_json: AsJson = False) -> None:
    """Legacy: start the sessions of text appointments that are due within five minutes."""
    _trigger(Triggers.activate_booked_appointments, as_json)


def _trigger(command: Callable[[Triggers], Awaitable[TriggerRun]], as_json: bool) -> None:
    async def run() -> TriggerRun:
        settings = home.logging_settings()
        async with telemetry(settings, "sessiongate-cli") as (metrics, _), opened(settings) as database:
            flags = LiveFlags(flags_of(home.flag_settings()), database=database, metrics=metrics)
            await flags.reload()
            converter = Converter(
                database,
                Reporter(None).batch,
                worker=_WORKER,
                counts=False,
                batch_limit=settings.conversion_batch_limit,
            )
            return await command(Triggers(database, Silence(), flags, metrics, converter))

    done = asyncio.run(run())
    if as_json:
        typer.echo(json.dumps({**done.fields(), "disabled": done.disabled}))
        return
    if done.disabled:
        Console().print("Legacy appointment triggers disabled.")
        return
    table = Table("processed", "skipped", "tenants left alone")
    table.add_row(str(done.processed), str(done.skipped), str(done.disabled_tenants))
    Console().print(table)


def _parse_lookback(text: str) -> timedelta | None:
    """`24h`, `7d`, a bare number of hours, or `all` (None)."""
    if text == "all":
        return None
    match = _LOOKBACK.fullmatch(text)
    if match is None:
        raise CommandError("--lookback is a number of hours or days such as 24h or 7d, or the word all.")
    number = int(match[1])
    return timedelta(days=number) if match[2] == "d" else timedelta(hours=number)


@asynccontextmanager
async def _converting(as_json: bool) -> AsyncIterator[tuple[Converter, list[Outcome], Reporter]]:
    """A converter for this process, the list that its outcomes are added to, and who reports them. The outcomes
    are counted by a worker, from the rows of its run."""
    settings = home.logging_settings()
    outcomes: list[Outcome] = []
    reporter = Reporter(None)
    async with telemetry(settings, "sessiongate-cli"), opened(settings) as database:
        with progress_bar("converting", hidden=as_json) as show:

            def on_batch(run: Run, batch: list[Outcome], began_ns: int) -> None:
                reporter.batch(run, batch, began_ns)
                outcomes.extend(batch)
                show(run.attempted_count, max(run.due_count, run.attempted_count))

            converter = Converter(
                database, on_batch, worker=_WORKER, counts=False, batch_limit=settings.conversion_batch_limit
            )
            yield converter, outcomes, reporter


def _show_run(run: Run, outcomes: Sequence[Outcome], as_json: bool, *, dry_run: bool) -> None:
    if as_json:
        listed = [
            {
                "appointment_id": outcome.appointment_id,
                "result": outcome.result,
                "session_id": outcome.session_id,
                "failure_reason": outcome.reason,
                "error_message": outcome.error_message,
                "parked": outcome.parked,
            }
            for outcome in outcomes
        ]
        typer.echo(json.dumps({**run.fields(), "dry_run": dry_run, "appointments": listed}))
        return
    console = Console()
    if outcomes:
        table = Table("appointment", "modality", "would be" if dry_run else "result", "session", "why")
        for outcome in outcomes:
            session = "" if outcome.session_id is None else str(outcome.session_id)
            why = f"{outcome.reason}: {outcome.error_message}" if outcome.reason else ""
            table.add_row(str(outcome.appointment_id), outcome.modality, outcome.result, session, why)
        console.print(table)
    summary = Table("due", "attempted", "created", "skipped", "failed", "ms")
    counts = (run.due_count, run.attempted_count, run.created_count, run.skipped_count, run.failed_count)
    summary.add_row(*map(str, counts), f"{run.runtime_ms:.1f}")
    console.print(summary)


def _show_report(report: monitor.Report) -> None:
    table = Table("", "now", "alert")

    def level(word: monitor.Level) -> str:
        return f"[{_COLOURS[word]}]{word}[/]"

    rate = report.error_rate_alert
    table.add_row("due", str(report.appointments_due_count), level(report.backlog_alert.level))
    table.add_row("oldest due, seconds", f"{report.oldest_due_seconds:.1f}", "")
    table.add_row("failed of attempted", f"{rate.failed} of {rate.attempted} ({rate.rate:.1%})", level(rate.level))
    table.add_row("created in the last minute", str(report.created_last_minute), level(report.creation_alert.level))
    table.add_row("failed in the last minute", str(report.failed_last_minute), "")
    table.add_row("created in all", str(report.appointment_sessions_created_total), "")
    table.add_row("failed in all", str(report.appointment_session_conversion_failed_total), "")
    table.add_row("parked, needs attention", str(report.needs_attention), "")
    Console().print(table)
