"""The rules on a live Prometheus that scrapes a running API and worker."""

from typing import Any

import pytest

from deploy.generate import prometheus as generated
from libs.domain.catalogue import CATALOGUE
from libs.observability.rules import Recording
from tests.deploy.conftest import Stack
from tests.deploy.generated import Expression, of_boards
from tests.deploy.monitoring import Prometheus
from tests.processes import until

ALIASES = sorted({rule.record for rule in generated.RULES["aliases"][0].rules if isinstance(rule, Recording)})


async def test_both_processes_are_scraped(prometheus: Prometheus) -> None:
    up = await until(lambda: prometheus.query("max_over_time(up[1m]) == 1"))
    jobs = sorted(each["metric"]["job"] for each in up)
    assert jobs == ["alertmanager", "prometheus", "sessiongate-api", "sessiongate-worker"]


async def test_every_rule_is_evaluated_without_an_error(prometheus: Prometheus) -> None:
    rules = await prometheus.rules()
    assert len(rules) == sum(len(group.rules) for group in generated.groups())
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.parametrize("name", ALIASES)
async def test_every_other_name_of_a_metric_is_answered(prometheus: Prometheus, name: str) -> None:
    assert await until(lambda: prometheus.query(name))


@pytest.mark.parametrize(
    "metric",
    [
        "http_request_duration_seconds",
        "scheduling_book_duration_seconds",
        "booking_post_own_duration_seconds",
        "chat_message_processing_duration_seconds",
        "appointment_start_delay_seconds",
        "settlement_duration_seconds",
    ],
)
async def test_what_is_slow_leads_to_its_trace(prometheus: Prometheus, metric: str) -> None:
    async def exemplars() -> list[str]:
        found = await prometheus.get("query_exemplars", query=f"{metric}_bucket", start="0", end="9e9")
        return [each["labels"]["trace_id"] for series in found for each in series["exemplars"]]

    assert all(len(trace_id) == 32 for trace_id in await until(exemplars))


@pytest.mark.parametrize("expression", [*of_boards()], ids=str)
async def test_every_panel_has_something_to_show(prometheus: Prometheus, expression: Expression) -> None:
    answers = await prometheus.query(expression.text)
    assert answers or expression.may_be_empty


@pytest.mark.parametrize("emitter", ["api", "worker"])
async def test_metrics_of_one_process_stay_at_zero_in_the_other(prometheus: Prometheus, emitter: str) -> None:
    names = "|".join(f"{spec.name}|{spec.name}_count" for spec in CATALOGUE if spec.emitter == emitter)
    assert await prometheus.query(f'{{__name__=~"{names}", job="sessiongate-{emitter}"}} > 0')
    moving = await prometheus.query(f'{{__name__=~"{names}", job=~"sessiongate-.*", job!="sessiongate-{emitter}"}} > 0')
    assert sorted({each["metric"]["__name__"] for each in moving}) == []


async def test_a_worker_that_dies_is_told_to_whoever_is_on_call_and_kept_by_the_api_until_it_is_back(
    stack: Stack,
) -> None:
    """Through Prometheus and Alertmanager, as they are configured."""

    async def kept(status: str) -> list[dict[str, Any]]:
        async with stack.api.client(stack.operator) as operator:
            page = (await operator.get("/admin/alerts", params={"status": status, "severity": "critical"})).json()
        return [item for item in page["items"] if item["labels"].get("job") == "sessiongate-worker"]

    async def told(status: str) -> list[Any]:
        payloads = [received.told for received in stack.oncall.got[before:]]
        alerts = [alert for payload in payloads for alert in payload["alerts"] if alert["status"] == status]
        return [alert for alert in alerts if alert["labels"].get("job") == "sessiongate-worker"]

    async def is_well() -> bool:
        return not await kept("firing")

    async def is_over() -> bool:
        return firing["id"] in {item["id"] for item in await kept("resolved")}

    await until(is_well)  # it was down before it was started
    before = len(stack.oncall.got)
    await stack.worker.kill()
    (firing,) = await until(lambda: kept("firing"))
    page = await until(lambda: told("firing"))
    stack.worker = await stack.start_worker()
    await until(is_over)
    await until(lambda: told("resolved"))

    assert (firing["name"], firing["component"], firing["metric"]) == ("TargetDown", "process", "up")
    assert (firing["value"], firing["threshold"]) == (0, 0)
    assert firing["annotations"]["runbook"] == "docs/runbooks/target-down.md"
    assert page[0]["annotations"] == firing["annotations"]
    assert {received.headers["authorization"] for received in stack.oncall.got} == {
        "Bearer a token of whoever is on call"
    }
