"""What benchmarks share: rounds, tables, and the file of results."""

import json
import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from rich.console import Console
from rich.table import Table

RESULTS: Final = Path(".bench/latest.json")
ROUNDS: Final = 3

console: Final = Console()


@dataclass
class Result:
    """`figures` have their unit in their name; `ratios` compare two figures of the same run."""

    figures: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    goals: dict[str, str] = field(default_factory=dict)


async def interleaved(contestants: Mapping[str, Callable[[], Awaitable[float]]]) -> dict[str, float]:
    """The median figure of each contestant; in every round each of them runs once."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        for name, run in contestants.items():
            figures[name].append(await run())
            console.print(f"  round {number + 1} of {ROUNDS}: {name} {figures[name][-1]:,.0f}", style="dim")
    return {name: median(measured) for name, measured in figures.items()}


def machine() -> str:
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.machine()}"


def show(name: str, result: Result) -> None:
    table = Table("figure", "value", title=name, title_justify="left")
    for figure, value in result.figures.items():
        table.add_row(figure, f"{value:,.2f}" if value < 1000 else f"{value:,.0f}")
    for ratio, value in result.ratios.items():
        wanted = f"  (to reach: {result.goals[ratio]})" if ratio in result.goals else ""
        table.add_row(f"ratio to {ratio}", f"{value:.2f}{wanted}")
    console.print(table)


def keep(name: str, result: Result) -> None:
    """Writes the result beside those of the other benchmarks."""
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[name] = {"figures": result.figures, "ratios": result.ratios, "machine": machine()}
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
