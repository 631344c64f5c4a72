"""What a request costs more for being observed: processor time of one process, beside the same route unobserved."""

import tempfile
from functools import partial
from typing import Final

import orjson

from tests.benchmarks.harness import Figures, Result, interleaved
from tests.benchmarks.http_load import Once, Request, load
from tests.benchmarks.observed import ROUTE
from tests.benchmarks.serving import Served, serving

WARM_UP: Final = 1000
REQUESTS: Final = 10_000


async def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        async with serving("endpoints:collector") as collector:
            contestants = {name: partial(_measure, name, collector, folder) for name in ("bare", "product", "usual")}
            figures = await interleaved(contestants)
    bare = figures.pop("bare")["us"]
    added = {f"{name}_adds_us": measured["us"] - bare for name, measured in figures.items()}
    return Result(
        figures={"bare_us": bare, **added},
        ratios={"usual": added["product_adds_us"] / added["usual_adds_us"]},
        goals={"usual": "at most 0.7"},
    )


async def _measure(name: str, collector: Served, folder: str) -> Figures:
    """Microseconds of processor time per request, those of the exporting threads included."""
    request = Request.post(ROUTE, orjson.dumps({"name": "tea"}))
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}", "FOLDER": folder}
    async with serving(f"observed:{name}", **environment) as served:
        await load(Once(served.port, [request] * WARM_UP))
        began = served.processor_seconds()
        await load(Once(served.port, [request] * REQUESTS))
        return {"us": (served.processor_seconds() - began) / REQUESTS * 1e6}
