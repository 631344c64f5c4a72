"""`python -m tests.benchmarks [name …]`: runs all benchmarks, or those named."""

import asyncio
import sys

from tests.benchmarks import conversion, fanout, growth, latency, send, settlement, telemetry
from tests.benchmarks.harness import console, keep, show

BENCHMARKS = {
    "conversion": conversion.run,
    "fanout": fanout.run,
    "growth": growth.run,
    "latency": latency.run,
    "send": send.run,
    "settlement": settlement.run,
    "telemetry": telemetry.run,
}


async def main(names: list[str]) -> None:
    for name in names or BENCHMARKS:
        console.print(f"[bold]{name}[/bold]")
        result = await BENCHMARKS[name]()
        show(name, result)
        keep(name, result)


# Processes that benchmarks start by `spawn` import this module once more.
if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - BENCHMARKS.keys():
        sys.exit(f"There is no benchmark {', '.join(sorted(unknown))}. There are: {', '.join(BENCHMARKS)}.")
    asyncio.run(main(sys.argv[1:]))
