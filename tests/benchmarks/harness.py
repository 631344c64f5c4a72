"""What benchmarks share: databases, rounds, tables, and the file of results."""

import json
import os
import platform
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from math import ceil
from pathlib import Path
from statistics import median
from typing import Final

from rich.console import Console
from rich.table import Table

from services.cli.embedded import Servers
from tests.servers import administration, copy_of

RESULTS: Final = Path(".bench/latest.json")
ROUNDS: Final = 3

Figures = dict[str, float]
"""What was measured, each figure with its unit in its name."""

console: Final = Console()

_copies: Final = count(1)


@dataclass
class Result:
    """`ratios` compare two figures of the same run; `goals` are for ratios and for figures."""

    figures: Figures = field(default_factory=dict)
    ratios: Figures = field(default_factory=dict)
    goals: dict[str, str] = field(default_factory=dict)


@asynccontextmanager
async def fresh_copy(servers: Servers, template: str) -> AsyncIterator[str]:
    """A database for one contestant, who does not pay for the writing of the copy."""
    async with copy_of(servers, template, f"copy_{next(_copies)}") as name:
        async with administration(servers) as connection:
            await connection.execute("CHECKPOINT")
        yield name


async def interleaved(contestants: Mapping[str, Callable[[], Awaitable[Figures]]]) -> dict[str, Figures]:
    """The median figures of each contestant; in every round each of them runs once."""
    measured: dict[str, list[Figures]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        for name, run in contestants.items():
            figures = await run()
            measured[name].append(figures)
            told = ", ".join(f"{figure} {value:,.{0 if value >= 100 else 2}f}" for figure, value in figures.items())
            console.print(f"  round {number + 1} of {ROUNDS}: {name} {told}", style="dim")
    return {
        name: {figure: median(figures[figure] for figures in rounds) for figure in rounds[0]}
        for name, rounds in measured.items()
    }


def named(figures: Mapping[str, Figures]) -> Figures:
    """The figures of all contestants under their names: `product_per_second`."""
    return {f"{name}_{figure}": value for name, own in figures.items() for figure, value in own.items()}


def speeds(figures: Mapping[str, Figures], of: str, *others: str, figure: str = "per_second") -> Figures:
    """How many times as fast as each of the others one of the contestants is."""
    return {other: figures[of][figure] / figures[other][figure] for other in others}


def percentile(ascending: Sequence[float], share: float) -> float:
    return ascending[max(0, ceil(share * len(ascending)) - 1)]


def machine() -> str:
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.machine()}"


def show(name: str, result: Result) -> None:
    table = Table("figure", "value", title=name, title_justify="left")
    for figure, value in result.figures.items():
        table.add_row(figure, (f"{value:,.2f}" if value < 1000 else f"{value:,.0f}") + _goal(result, figure))
    for ratio, value in result.ratios.items():
        table.add_row(f"ratio to {ratio}", f"{value:.2f}{_goal(result, ratio)}")
    console.print(table)


def _goal(result: Result, of: str) -> str:
    return f"  (to reach: {result.goals[of]})" if of in result.goals else ""


def keep(name: str, result: Result) -> None:
    """Writes the result beside those of the other benchmarks."""
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[name] = {"figures": result.figures, "ratios": result.ratios, "machine": machine()}
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
