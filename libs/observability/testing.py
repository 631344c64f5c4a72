"""For tests of whatever uses this library: captured log lines, and a collector that speaks OTLP."""

import gzip
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import grpc
import orjson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.resources import SERVICE_NAME

from libs.observability.logging import Logging, LogSettings, configure_logging
from libs.observability.registry import Metrics


class CapturedLogs:
    """The lines of a log file, parsed."""

    def __init__(self, path: Path, logging: Logging) -> None:
        self._path = path
        self._logging = logging

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """Everything logged so far, or the lines of one event."""
        return [line for line in map(orjson.loads, self.raw().splitlines()) if event in (None, line["event"])]

    def raw(self) -> str:
        self._logging.flush()
        return self._path.read_text()


@contextmanager
def capture_logs(level: str = "INFO", *, metrics: Metrics | None = None, **settings: Any) -> Iterator[CapturedLogs]:
    """Captures all logs of this process as they would be written to a file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "captured.jsonl"
        configured = LogSettings(service="test", version="0", level=level, path=path, **settings)
        logging = configure_logging(configured, metrics or Metrics((), version="0", service="test"))
        try:
            yield CapturedLogs(path, logging)
        finally:
            logging.close()


class OtlpReceiver:
    """A trace collector on this machine: OTLP over HTTP at `http_endpoint`, over gRPC at `grpc_endpoint`."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._services: dict[bytes, str] = {}
        self._arrived = threading.Condition()

    def __enter__(self) -> Self:
        receive = self._receive

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receive(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        class Servicer(TraceServiceServicer):
            def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
                receive(request)
                return ExportTraceServiceResponse()

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self._grpc = grpc.server(futures.ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(Servicer(), self._grpc)  # type: ignore[no-untyped-call]
        self.http_endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self.grpc_endpoint = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(None)

    def spans(self, name: str | None = None) -> list[Span]:
        """The spans received so far, or those of one name."""
        with self._arrived:
            return [span for span in self._spans if name in (None, span.name)]

    def service_of(self, span: Span) -> str:
        """The name of the service that a received span is from."""
        return self._services[span.span_id]

    def wait_for(self, name: str, count: int = 1, timeout: float = 10.0) -> list[Span]:
        """The spans of that name once there are `count`. Raises TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: sum(s.name == name for s in self._spans) >= count, timeout):
                seen = sorted({span.name for span in self._spans})
                raise TimeoutError(f"No {count} spans {name!r}; there were {seen}.")
            return [span for span in self._spans if span.name == name]

    def _receive(self, request: ExportTraceServiceRequest) -> None:
        with self._arrived:
            for sent in request.resource_spans:
                (service,) = [item.value.string_value for item in sent.resource.attributes if item.key == SERVICE_NAME]
                for scope in sent.scope_spans:
                    self._spans.extend(scope.spans)
                    self._services.update((span.span_id, service) for span in scope.spans)
            self._arrived.notify_all()


def attributes(span: Span) -> dict[str, Any]:
    """The attributes of a received span as plain values."""
    return {item.key: getattr(item.value, item.value.WhichOneof("value") or "string_value") for item in span.attributes}
