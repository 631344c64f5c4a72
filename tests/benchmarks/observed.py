"""One trivial route, observed in three ways: not at all, as the product is, and by what is usual with FastAPI.

`usual` is prometheus-fastapi-instrumentator beside OpenTelemetry's own instrumentation and SDK, all by default. Only
`product` writes a line for each request.
"""

import os
import tempfile
from pathlib import Path

from fastapi import FastAPI
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_fastapi_instrumentator import Instrumentator
from pydantic import BaseModel

from libs.domain.catalogue import CATALOGUE
from libs.observability.http import App, HttpTelemetry, RequestTracing, Scope
from libs.observability.logging import LogSettings, configure_logging
from libs.observability.registry import Metrics
from libs.observability.tracing import configure_tracing, tracer_provider

ROUTE = "/items"


class Item(BaseModel):
    name: str


def bare() -> FastAPI:
    app = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})

    @app.post(ROUTE)
    async def take(item: Item) -> Item:
        return item

    return app


def product() -> App:
    app = bare()
    metrics = Metrics(CATALOGUE, version="0", service="benchmark")
    folder = tempfile.mkdtemp(dir=os.environ["FOLDER"])
    configure_logging(LogSettings(service="benchmark", version="0", path=Path(folder) / "log.jsonl"), metrics)
    configure_tracing("benchmark", "0", metrics)

    def route_of(_: Scope) -> str:
        return ROUTE

    app.add_middleware(HttpTelemetry, metrics=metrics, route_of=route_of)
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=tracer_provider(),
        meter_provider=NoOpMeterProvider(),
        exclude_spans=["receive", "send"],
    )
    return RequestTracing(app)


def usual() -> FastAPI:
    app = bare()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    Instrumentator().instrument(app)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    return app
