"""The few shapes of PromQL that panels are made of.

`series` is a name with or without a selector, such as `x_total` or `x_total{result="ok"}`; a histogram is
named without its suffix. `by` lists the labels that remain.
"""

from typing import Final

STEP: Final = "$__rate_interval"
"""Grafana's window for rates: never shorter than four scrapes, never shorter than a point of the graph is wide."""


def total(series: str, *by: str) -> str:
    return f"sum{_by(by)}({series})"


def largest(series: str, *by: str) -> str:
    """Gauges of the database are set by every worker alike: their sum would count each thing twice."""
    return f"max{_by(by)}({series})"


def rate(series: str, *by: str, over: str = STEP) -> str:
    """Per second."""
    return f"sum{_by(by)}(rate({series}[{over}]))"


def per_minute(series: str, *by: str) -> str:
    return f"60 * {rate(series, *by)}"


def increase(series: str, *by: str, over: str) -> str:
    return f"sum{_by(by)}(increase({series}[{over}]))"


def quantile(share: float, histogram: str, *by: str, over: str = STEP) -> str:
    return f"histogram_quantile({share}, {rate(part(histogram, 'bucket'), 'le', *by, over=over)})"


def mean(histogram: str, *by: str, over: str) -> str:
    return f"{rate(part(histogram, 'sum'), *by, over=over)} / {rate(part(histogram, 'count'), *by, over=over)}"


def ratio(some: str, all_: str) -> str:
    """0 where there was none of `some`, and nothing at all where there was no traffic."""
    return f"({some} or 0 * {all_}) / ({all_} > 0)"


def or_zero(expression: str) -> str:
    return f"{expression} or vector(0)"


def part(histogram: str, suffix: str) -> str:
    """`x_seconds{a="b"}` with the suffix behind the name."""
    name, brace, selector = histogram.partition("{")
    return f"{name}_{suffix}{brace}{selector}"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""
