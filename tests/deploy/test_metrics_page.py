"""docs/metrics.md, and what Prometheus' own linter thinks of what is listed there."""

import re
import subprocess

from deploy.generate.metrics_page import files
from libs.domain.catalogue import CATALOGUE
from libs.observability.catalogue import OWN
from libs.observability.exposition import render
from libs.observability.registry import Metrics
from tests.deploy.monitoring import installed


def test_a_row_tells_all_that_the_catalogue_knows() -> None:
    page = files()["docs/metrics.md"]
    assert len(re.findall(r"^\| `", page, re.MULTILINE)) == len((*OWN, *CATALOGUE))
    assert (
        "| `http_request_duration_seconds` | histogram | seconds | `route`: the first 80<br>`method`: `GET`, `POST`,"
        " `PUT`, `PATCH`, `DELETE`, `HEAD`, `OPTIONS`, `OTHER`<br>`status`: the first 30 | api | HTTP server request"
        " duration. Also: `http_request_duration_ms` |\n"
    ) in page
    assert (
        "| `chat_session_messages` | histogram |  |  |  | Messages per ended session."
        " Bounds: 1, 2, 5, 10, 20, 50, 100, 200, 500 |\n"
    ) in page


def test_prometheus_has_one_objection_to_the_names() -> None:
    exposed, _ = render(Metrics(CATALOGUE, version="0", service="test"), "")
    checked = subprocess.run([installed("promtool"), "check", "metrics"], input=exposed, capture_output=True)
    assert re.findall(r"^\w+", checked.stderr.decode(), re.MULTILINE) == ["appointments_due_count"]
