"""Alerts and recording rules as data, and those that follow from a catalogue or from an objective by themselves.

Nothing here knows a metric: a product gives the catalogue, the alerts and the objectives, and gets the groups of a
Prometheus rule file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from libs.observability.catalogue import MetricSpec

Severity = Literal["critical", "high", "warning", "info"]

QUANTILES: Final = (0.5, 0.95, 0.99)
"""Those that a summary tells."""

RATE: Final = "5m"
"""Over which a quantile is taken where nothing else is said."""

MINIMUM_EVENTS: Final = 20
"""So many events there must be for their failures to say something: of three requests one is a third."""

_COMPARED: Final = re.compile(r"(?:[<>]=?|[=!]=) (\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that is computed from others, and under which name it is kept."""

    record: str
    expr: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        labels = {"labels": dict(self.labels)} if self.labels else {}
        return {"record": self.record, "expr": self.expr} | labels


@dataclass(frozen=True, slots=True)
class Alert:
    """Fires while `expr` has an answer, once it has had one for the time `lasting`, such as `5m`.

    The first number that the expression compares with is the threshold, and its value is of that comparison's left
    side. `description` may name the value and labels in the language of Prometheus' templates. `metric` is what to
    look at first, `runbook` a page. An alert that `supersedes` another one says the same more urgently: while it
    fires the other one is not told.
    """

    name: str
    expr: str
    severity: Severity
    component: str
    metric: str
    summary: str
    description: str
    runbook: str
    lasting: str | None = None
    supersedes: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _COMPARED.search(self.expr):
            raise ValueError(f"{self.name} compares with no number.")

    @property
    def threshold(self) -> str:
        compared = _COMPARED.search(self.expr)
        assert compared is not None
        return compared[1]

    @property
    def own_labels(self) -> dict[str, str]:
        """What the alert adds to the labels of its expression."""
        return {**self.labels, "severity": self.severity, "component": self.component}

    @property
    def annotations(self) -> dict[str, str]:
        return {
            "summary": self.summary,
            "description": self.description,
            "runbook": self.runbook,
            "metric": self.metric,
            "value": '{{ $value | printf "%.6g" }}',
            "threshold": self.threshold,
        }

    def document(self) -> dict[str, Any]:
        lasting = {"for": self.lasting} if self.lasting else {}
        labelled = {"labels": self.own_labels, "annotations": self.annotations}
        return {"alert": self.name, "expr": self.expr} | lasting | labelled


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated one after the other, as of the same moment; every `interval`, where it is said."""

    name: str
    rules: tuple[Recording | Alert, ...]
    interval: str | None = None

    def document(self) -> dict[str, Any]:
        interval = {"interval": self.interval} if self.interval else {}
        return {"name": self.name, **interval, "rules": [rule.document() for rule in self.rules]}


def document(groups: Iterable[Group]) -> dict[str, Any]:
    """A Prometheus rule file."""
    return {"groups": [group.document() for group in groups]}


def scoped(groups: Iterable[Group], metrics: Iterable[str], matcher: str) -> tuple[Group, ...]:
    """The same groups, in which whatever is selected of these metrics has to meet the matcher too.

    A Prometheus may scrape many products, and several of them a metric of the same name.
    """
    selected = re.compile(
        rf"(?<![\w:])((?:{'|'.join(metrics)})(?:_bucket|_sum|_count)?)(?![\w:])"
        r"""(?:\{((?:[^"}]|"[^"]*")*)\})?"""
    )

    def narrowed(found: re.Match[str]) -> str:
        return f"{found[1]}{{{', '.join(filter(None, (matcher, found[2])))}}}"

    return tuple(
        replace(group, rules=tuple(replace(rule, expr=selected.sub(narrowed, rule.expr)) for rule in group.rules))
        for group in groups
    )


def aliases(catalogue: Iterable[MetricSpec]) -> Group:
    """Answers for metrics under the names that `source_alias` gives them.

    Those names have no colons, against the custom for recording rules: they are there for queries that were written
    before. A histogram in seconds is told as a summary in milliseconds. Its quantiles are of all processes together;
    its sum and count stay apart by process, since the sum of counters falls when one of them restarts.
    """
    return Group("source-aliases", tuple(rule for spec in catalogue for rule in _aliases(spec)))


def _aliases(spec: MetricSpec) -> Iterable[Recording]:
    name = spec.source_alias
    if name is None:
        return
    if spec.alias_expr is not None:
        yield Recording(name, spec.alias_expr)
        return
    by = ", ".join(["le", *(label.name for label in spec.labels)])
    rates = f"sum by ({by}) (rate({spec.name}_bucket[{RATE}]))"
    for quantile in QUANTILES:
        expr = f"1000 * histogram_quantile({quantile:g}, {rates})"
        yield Recording(name, expr, {"quantile": f"{quantile:g}"})
    yield Recording(f"{name}_sum", f"1000 * {spec.name}_sum")
    yield Recording(f"{name}_count", f"{spec.name}_count")


@dataclass(frozen=True, slots=True)
class Burn:
    """How fast an error budget may burn, as a multiple of the pace at which it lasts for its whole period of 30
    days. Both windows must agree: the long one that it matters, the short one that it still happens."""

    factor: float
    short: str
    long: str


PAGE: Final = (Burn(14.4, "5m", "1h"), Burn(6, "30m", "6h"))
"""2 % of the budget in an hour, or 5 % in six."""

TICKET: Final = (Burn(3, "2h", "1d"), Burn(1, "6h", "3d"))
"""10 % of the budget in a day, or in three."""

WINDOWS: Final = ("5m", "30m", "1h", "2h")
LONG_WINDOWS: Final = ("6h", "1d", "3d")
"""Those of the error ratios. What a long one says changes slowly, and takes long to compute."""

LONG_INTERVAL: Final = "2m"

COUNTED: Final = {"30m": 1800, "6h": 21600}
"""The windows over which events are counted for the page and for the ticket, in seconds."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A service level objective: the share `target` of all events is to be good.

    `bad` and `events` are PromQL for the rate of bad events and of all events, without labels, in which `$window`
    stands for the range; `bad` must answer 0 and not nothing when there are none. `failing` says which events are
    bad, such as "requests fail". Raises ValueError when the budget is so large that it cannot burn fast enough.
    """

    name: str
    target: float
    bad: str
    events: str
    component: str
    metric: str
    failing: str
    runbook: str

    def __post_init__(self) -> None:
        fastest = max(burn.factor for burn in (*PAGE, *TICKET))
        if not 0 < fastest * self.budget < 1:
            raise ValueError(f"{self.name}: errors cannot burn a budget of {self.budget:g} {fastest:g} times as fast.")

    @property
    def budget(self) -> float:
        """The share of events that may be bad."""
        return round(1 - self.target, 9)

    def groups(self) -> tuple[Group, Group]:
        """The alerts, and what they rest on: `slo:error_ratio:rate5m{slo="…"}` and so on for all windows,
        `slo:events:increase30m` and `…6h`, and the target as `slo:objective:ratio`."""
        labels = {"slo": self.name}
        now: tuple[Recording | Alert, ...] = (
            *map(self._ratio, WINDOWS),
            *(
                Recording(f"slo:events:increase{window}", f"{seconds} * {_over(self.events, window)}", labels)
                for window, seconds in COUNTED.items()
            ),
            Recording("slo:objective:ratio", f"vector({self.target:g})", labels),
            *self.alerts(),
        )
        return (
            Group(f"slo-{self.name}", now),
            Group(f"slo-{self.name}-long", tuple(map(self._ratio, LONG_WINDOWS)), LONG_INTERVAL),
        )

    def alerts(self) -> tuple[Alert, ...]:
        """What watches the budget: pages when it would be gone within days, tickets when within weeks; for each pair of
        windows one, which `window` tells apart by the longer."""
        return (
            *(self._alert("critical", burn, "2m", "30m") for burn in PAGE),
            *(self._alert("warning", burn, "15m", "6h") for burn in TICKET),
        )

    def _ratio(self, window: str) -> Recording:
        expr = f"{_over(self.bad, window)}\n/\n{_over(self.events, window)}"
        return Recording(f"slo:error_ratio:rate{window}", expr, {"slo": self.name})

    def _alert(self, severity: Severity, burn: Burn, lasting: str, counted: str) -> Alert:
        limit = f"{burn.factor * self.budget:.6g}"
        burning = (
            f"slo:error_ratio:rate{burn.short}{self._selector} > {limit}"
            f"\nand\nslo:error_ratio:rate{burn.long}{self._selector} > {limit}"
        )
        return Alert(
            name="SLOErrorBudgetBurn",
            expr=f"{burning}\nand\nslo:events:increase{counted}{self._selector} > {MINIMUM_EVENTS}",
            severity=severity,
            component=self.component,
            metric=self.metric,
            summary=f"The error budget of {self.name} burns too fast",
            description=f"{{{{ $value | humanizePercentage }}}} of {self.failing}; {100 * self.budget:g}% may.",
            runbook=self.runbook,
            lasting=lasting,
            labels={"slo": self.name, "window": burn.long},
        )

    @property
    def _selector(self) -> str:
        return f'{{slo="{self.name}"}}'


def _over(rate: str, window: str) -> str:
    return rate.replace("$window", window)
