"""The rules on a live Prometheus that scrapes a running API and worker."""

import pytest

from deploy.generate import prometheus as generated
from libs.domain.catalogue import CATALOGUE
from libs.observability.rules import Recording
from tests.deploy.generated import Expression, of_boards
from tests.deploy.monitoring import Prometheus
from tests.processes import until

ALIASES = sorted({rule.record for rule in generated.RULES["aliases"][0].rules if isinstance(rule, Recording)})


async def test_both_processes_are_scraped(prometheus: Prometheus) -> None:
    up = {each["metric"]["job"]: each["value"][1] for each in await prometheus.query("up")}
    assert up == dict.fromkeys(("sessiongate-api", "sessiongate-worker", "prometheus", "alertmanager"), "1")


async def test_every_rule_is_evaluated_without_an_error(prometheus: Prometheus) -> None:
    rules = await prometheus.rules()
    assert len(rules) == sum(len(group.rules) for group in generated.groups())
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.parametrize("name", ALIASES)
async def test_every_other_name_of_a_metric_is_answered(prometheus: Prometheus, name: str) -> None:
    assert await until(lambda: prometheus.query(name))


async def test_a_slow_request_leads_to_its_trace(prometheus: Prometheus) -> None:
    async def exemplars() -> list[str]:
        found = await prometheus.get(
            "query_exemplars", query="http_request_duration_seconds_bucket", start="0", end="9e9"
        )
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
