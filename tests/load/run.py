"""Runs the load against an `up` of its own and reads k6's summary."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import asyncpg

from libs.guardrails import Principal, Role
from tests.cli.conftest import Up, open_folder
from tests.population import populate, settle
from tests.processes import until
from tests.running import SECRET, token_of

ROOMS: Final = 120
SCRIPT: Final = Path(__file__).with_name("mixed.js")

_ROOMS: Final = """
    SELECT s.tenant_id, s.patient_id, s.doctor_id, s.appointment_id, s.kind || '_session:' || s.id AS context
    FROM sessions s WHERE s.tenant_id = (SELECT id FROM tenants WHERE name = 'Crowd') ORDER BY s.id
"""


@dataclass(frozen=True)
class Budget:
    """What an operation may take: `percentile` of its requests at most so many ms."""

    percentile: int
    ms: float


BUDGETS: Final = {
    "book": Budget(95, 500),
    "poll": Budget(95, 100),
    "send": Budget(99, 20),
    "history": Budget(95, 100),
    "socket_open": Budget(95, 500),
    "socket_ack": Budget(99, 50),
    "socket_delivery": Budget(99, 100),
}
"""Booking has the service level of the product, sending that of its benchmark; the others are what a person does
not notice."""


@dataclass(frozen=True)
class Measured:
    """One operation: how often it was done well and not, and percentiles in ms."""

    count: int
    errors: int
    p50: float
    p95: float
    p99: float

    def keeps(self, budget: Budget) -> bool:
        return bool(asdict(self)[f"p{budget.percentile}"] <= budget.ms)


async def run(seconds: int) -> dict[str, Measured]:
    """Loads a fresh installation for so long; answers what was measured, by operation."""
    with open_folder() as folder:
        up = Up(folder, env={"SESSIONGATE_JWT_SECRET": SECRET})
        try:
            await asyncio.to_thread(up.wait_for, "Ctrl-C")
            whereabouts = up.whereabouts()
            rooms = folder / "rooms.json"
            rooms.write_text(json.dumps(await _open_rooms(whereabouts["database_url"])))
            summary = await asyncio.to_thread(_k6, whereabouts["api"], rooms, seconds)
        finally:
            up.process.terminate()
            up.process.wait()
    return {name: _measured(found) for name, found in summary.items()}


def _measured(found: dict[str, float]) -> Measured:
    p50, p95, p99 = (found.get(f"p({share})", 0.0) for share in (50, 95, 99))
    return Measured(int(found["count"]), int(found["errors"]), p50, p95, p99)


async def _open_rooms(owner_url: str) -> list[dict[str, Any]]:
    """Sessions that the worker has just made from appointments, each with a doctor and a patient of its own."""
    connection = await asyncpg.connect(owner_url)
    await populate(connection, ROOMS, datetime.now(UTC))

    async def converted() -> list[Any]:
        rows: list[Any] = await connection.fetch(_ROOMS)
        return rows if len(rows) == ROOMS else []

    rows = await until(converted)
    await settle(connection)
    await connection.close()
    return [
        {
            "context": row["context"],
            "appointment_id": row["appointment_id"],
            "doctor_id": row["doctor_id"],
            "doctor": token_of(Principal(row["doctor_id"], row["tenant_id"], Role.DOCTOR)),
            "patient": token_of(Principal(row["patient_id"], row["tenant_id"], Role.PATIENT)),
        }
        for row in rows
    ]


def _k6(api: str, rooms: Path, seconds: int) -> dict[str, dict[str, float]]:
    program = shutil.which("k6", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program, "k6 is not installed; `make load` installs it."
    settings = {"API": api, "ROOMS": str(rooms), "SECONDS": str(seconds)}
    options = [option for name, value in settings.items() for option in ("--env", f"{name}={value}")]
    finished = subprocess.run(
        [program, "run", "--quiet", "--no-usage-report", *options, SCRIPT],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=seconds + 60,
    )
    summary: dict[str, dict[str, float]] = json.loads(finished.stdout)
    return summary
