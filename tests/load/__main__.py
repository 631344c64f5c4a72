"""`python -m tests.load [seconds]`: loads, prints a table, and exits with 1 on errors or a budget that was missed."""

import asyncio
import sys

from rich.console import Console
from rich.table import Table

from tests.load.run import BUDGETS, run


def main(seconds: int) -> int:
    measured = asyncio.run(run(seconds))
    table = Table("operation", title=f"mixed load, {seconds} s", title_justify="left")
    for column in ("done", "errors", "p50 ms", "p95 ms", "p99 ms", "budget", "kept"):
        table.add_column(column, justify="right")
    well = True
    for name, found in measured.items():
        budget = BUDGETS[name]
        kept = found.keeps(budget)
        well = well and kept and not found.errors
        percentiles = (f"{value:.1f}" for value in (found.p50, found.p95, found.p99))
        said = f"p{budget.percentile} ≤ {budget.ms:g}"
        table.add_row(name, str(found.count), str(found.errors), *percentiles, said, "yes" if kept else "no")
    Console().print(table)
    return 0 if well else 1


sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 60))
