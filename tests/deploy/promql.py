"""What a PromQL expression answers, as far as that follows from the names in it: which labels its series have, and
whether it counts. Whatever cannot work is a mistake: a name, a label or a value of one that does not exist, a rate of
something that is no counter, two sides that share no labels and therefore never meet."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import promql_parser as parser
from promql_parser import AggModifierType, LabelModifierType, MatchOp

from libs.observability.catalogue import OTHER, MetricSpec

Values = frozenset[str] | None
"""Those that a label can have; None: any."""

_OF_COUNTERS: Final = {"rate", "irate", "increase", "resets"}
_OF_GAUGES: Final = {"delta", "idelta", "deriv", "predict_linear", "holt_winters"}
_SETS: Final = {"and", "or", "unless"}
_COMPARISONS: Final = {"==", "!=", ">", ">=", "<", "<="}


@dataclass(frozen=True)
class Series:
    """What series of one name, or of one expression, have in common. `more` says that they may have further labels."""

    labels: Mapping[str, Values]
    counts: bool = False
    more: bool = False

    def has(self, label: str) -> bool:
        return self.more or label in self.labels

    def only(self, names: list[str]) -> "Series":
        return replace(self, labels={name: self.labels.get(name) for name in names}, more=False)

    def without(self, *names: str) -> "Series":
        return replace(self, labels={name: values for name, values in self.labels.items() if name not in names})


def series_of(spec: MetricSpec, target: Mapping[str, Values]) -> Iterator[tuple[str, Series]]:
    """The names under which a metric is scraped; `target` are the labels that scraping adds."""
    own = {label.name: None if label.values is None else frozenset({*label.values, OTHER}) for label in spec.labels}
    labels = {**target, **own}
    if spec.kind != "histogram":
        yield spec.name, Series(labels, counts=spec.kind == "counter")
        return
    bounds = frozenset({*map(str, map(float, spec.buckets)), "+Inf"})
    yield f"{spec.name}_bucket", Series({**labels, "le": bounds}, counts=True)
    yield f"{spec.name}_sum", Series(labels, counts=True)
    yield f"{spec.name}_count", Series(labels, counts=True)


class Reading:
    """Reads one expression against the series that are `known`: `answer` is what it answers, None a bare number."""

    def __init__(self, expression: str, known: Mapping[str, Series]) -> None:
        self._known = known
        self.mistakes: list[str] = []
        self.selectors: list[parser.VectorSelector] = []
        try:
            parsed = parser.parse(expression)
        except ValueError as error:
            self.mistakes.append(str(error))
            self.answer: Series | None = Series({}, more=True)
        else:
            self.answer = self._read(parsed)

    def _read(self, node: parser.Expr) -> Series | None:
        match node:
            case parser.NumberLiteral() | parser.StringLiteral():
                return None
            case parser.ParenExpr(expr=inner) | parser.UnaryExpr(expr=inner) | parser.SubqueryExpr(expr=inner):
                return self._read(inner)
            case parser.MatrixSelector(vector_selector=inner):
                return self._selected(inner)
            case parser.VectorSelector():
                return self._selected(node)
            case parser.AggregateExpr():
                return self._aggregated(node)
            case parser.Call():
                return self._called(node)
            case parser.BinaryExpr():
                return self._combined(node)
        raise NotImplementedError(type(node).__name__)

    def _selected(self, selector: parser.VectorSelector) -> Series:
        self.selectors.append(selector)
        found = self._known.get(selector.name or "")
        if found is None:
            self.mistakes.append(f"there is no series {selector.name}")
            return Series({}, counts=True, more=True)
        for matcher in selector.matchers.matchers:
            self._must_have(found, matcher.name)
            values = found.labels.get(matcher.name)
            if values is not None and not _can_match(matcher, values):
                self.mistakes.append(f"{selector.name} never has {matcher.name}={matcher.value!r}")
        return found

    def _aggregated(self, node: parser.AggregateExpr) -> Series:
        inner = self._vector(node.expr)
        if node.modifier is None:
            kept = Series({})
        else:
            for label in node.modifier.labels:
                self._must_have(inner, label)
            by = node.modifier.type == AggModifierType.By
            kept = inner.only(node.modifier.labels) if by else inner.without(*node.modifier.labels)
        return inner if str(node.op) in ("topk", "bottomk") else replace(kept, counts=False)

    def _called(self, node: parser.Call) -> Series | None:
        name = node.func.name
        arguments = [self._read(argument) for argument in node.args]
        vector = next((argument for argument in arguments if argument is not None), None)
        if vector is None:
            return Series({}) if name == "vector" else None
        if name in _OF_COUNTERS and not vector.counts:
            self.mistakes.append(f"{name}() of what is no counter: {node.args[0].prettify()}")
        if name in _OF_GAUGES and vector.counts:
            self.mistakes.append(f"{name}() of a counter: {node.args[0].prettify()}")
        if name == "scalar":
            return None
        if name == "histogram_quantile":
            self._must_have(vector, "le")
            vector = vector.without("le")
        if name in ("label_replace", "label_join"):
            vector = replace(vector, labels={**vector.labels, node.args[1].val: None})
        return replace(vector, counts=False)

    def _combined(self, node: parser.BinaryExpr) -> Series | None:
        left, right = self._read(node.lhs), self._read(node.rhs)
        scaled = str(node.op) in ("*", "/")
        if left is None or right is None:
            one = left or right
            if one and one.counts and str(node.op) in _COMPARISONS:
                self.mistakes.append(f"{node.op} of a counter, which only ever grows: {node.prettify()}")
            return one and replace(one, counts=one.counts and scaled)
        matching = node.modifier.matching if node.modifier else None
        on = matching.labels if matching and matching.type == LabelModifierType.Include else None
        ignored = matching.labels if matching and on is None else []
        for label in on or ():
            self._must_have(left, label)
            self._must_have(right, label)
        grouped = (node.modifier.group_labels if node.modifier else None) is not None
        if str(node.op) == "or":
            return Series({**right.labels, **left.labels}, more=left.more or right.more)
        apart = set(left.without(*ignored).labels) ^ set(right.without(*ignored).labels)
        if on is None and not grouped and apart and not (left.more or right.more):
            self.mistakes.append(f"the sides of {node.op} never meet: only one of them has {', '.join(sorted(apart))}")
        if grouped or str(node.op) in _SETS:
            return replace(left, counts=False)
        return replace(left.without(*ignored) if on is None else left.only(on), counts=False)

    def _vector(self, node: parser.Expr) -> Series:
        return self._read(node) or Series({})

    def _must_have(self, series: Series, label: str) -> None:
        if not series.has(label):
            self.mistakes.append(f"there is no label {label} here, only {', '.join(sorted(series.labels)) or 'none'}")


def _can_match(matcher: Any, values: frozenset[str]) -> bool:
    """Whether each alternative of the matcher is a value, or matches one."""
    match matcher.op:
        case MatchOp.Equal | MatchOp.NotEqual:
            return matcher.value in values
    alternatives = [matcher.value] if "(" in matcher.value else matcher.value.split("|")
    return all(any(re.fullmatch(pattern, value) for value in values) for pattern in alternatives)
