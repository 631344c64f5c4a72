"""What boards are made of: a board has rows, a row has lines, and the panels of a line share its width."""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

from grafana_foundation_sdk.builders import common, dashboard, prometheus, statetimeline
from grafana_foundation_sdk.builders import heatmap as heatmaps
from grafana_foundation_sdk.builders import stat as stats
from grafana_foundation_sdk.builders import table as tables
from grafana_foundation_sdk.builders import timeseries as graphs
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    DataSourceRef,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLink,
    DashboardLinkType,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    GridPos,
    Panel,
    RowPanel,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import Dataquery, PromQueryFormat

from deploy.generate.boards import promql
from deploy.generate.boards.runbooks import INDEX, runbooks

DATASOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG: Final = "sessiongate"
COLUMNS: Final = 24
"""How wide Grafana's grid is."""
STAT_HEIGHT: Final = 4
GRAPH_HEIGHT: Final = 8

Limits = dashboard.ThresholdsConfig
"""From which values on a panel is no longer green."""

_Builder = TypeVar("_Builder", graphs.Panel, stats.Panel, heatmaps.Panel, tables.Panel, statetimeline.Panel)


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` names each series by its labels, as in `{{reason}}`."""

    expression: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """What a table shows beside the labels of its rows."""

    header: str
    expression: str
    unit: str


@dataclass(frozen=True, slots=True)
class Row:
    """Lines of panels below a title, which folds them away."""

    title: str
    lines: tuple[Sequence[Panel], ...]


def row(title: str, *lines: Sequence[Panel]) -> Row:
    return Row(title, lines)


def above(warning: float, critical: float | None = None) -> Limits:
    """Good below; with one number it is red from there on."""
    if critical is None:
        return colours(("green", None), ("red", warning))
    return colours(("green", None), ("orange", warning), ("red", critical))


def below(warning: float, critical: float) -> Limits:
    """Good from `warning` on, red below `critical`."""
    return colours(("red", None), ("orange", critical), ("green", warning))


def colours(*steps: tuple[str, float | None]) -> Limits:
    """From which value on it has which colour; the first has none."""
    return Limits().mode(ThresholdsMode.ABSOLUTE).steps([Threshold(value, colour) for colour, value in steps])


def timeseries(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    limits: Limits | None = None,
    stacked: bool = False,
    empty: str | None = None,
) -> Panel:
    """A graph; `limits` are drawn as lines. `empty` is said when there is nothing to draw, where that is nothing to
    worry about."""
    panel = (
        _titled(graphs.Panel(), title, description, unit)
        .min(0)
        .line_width(1)
        .fill_opacity(40 if stacked else 8)
        .show_points(VisibilityMode.NEVER)
        .legend(_legend().calcs(["lastNotNull", "max"]))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if limits is not None:
        panel.thresholds(limits)
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    if empty is not None:
        panel.no_value(empty)
    return panel.targets([_range(query, letter) for query, letter in _lettered(queries)]).build()


def latency(title: str, description: str, histogram: str, *by: str, limits: Limits | None = None) -> Panel:
    """The 95th percentile for each value of the labels, or without any the 50th, 95th and 99th of all; with exemplars,
    which lead to traces."""
    if by:
        queries = [Query(promql.quantile(0.95, histogram, *by), " ".join(f"{{{{{label}}}}}" for label in by), True)]
    else:
        queries = [Query(promql.quantile(q / 100, histogram), f"P{q}", True) for q in (50, 95, 99)]
    return timeseries(title, description, *queries, unit=units.Seconds, limits=limits)


def stat(
    title: str,
    description: str,
    expression: str,
    *,
    unit: str,
    legend: str = "",
    limits: Limits | None = None,
    empty: str | None = None,
) -> Panel:
    """The present value, large; with a legend, one for each series."""
    panel = (
        _titled(stats.Panel(), title, description, unit)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(BigValueGraphMode.NONE)
        .color_mode(BigValueColorMode.VALUE if limits is None else BigValueColorMode.BACKGROUND)
        .text_mode(BigValueTextMode.VALUE_AND_NAME if legend else BigValueTextMode.VALUE)
        .thresholds(limits or colours(("text", None)))
    )
    if empty is not None:
        panel.no_value(empty)
    return panel.with_target(_instant(expression, "A").legend_format(legend)).build()


def heatmap(title: str, description: str, histogram: str, *, unit: str) -> Panel:
    """How many observations fell into which bucket, over time."""
    buckets = promql.increase(promql.part(histogram, "bucket"), "le", over=promql.STEP)
    target = _range(Query(buckets, "{{le}}", exemplars=True), "A").format(PromQueryFormat.HEATMAP)
    return (
        _titled(heatmaps.Panel(), title, description, unit)
        .calculate(False)
        .color(heatmaps.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .y_axis(heatmaps.YAxisConfig().unit(unit))
        .with_target(target)
        .build()
    )


def states(
    title: str, description: str, query: Query, texts: dict[str, str], limits: Limits, *, empty: str | None = None
) -> Panel:
    """Which state each series was in, over time. `texts` says what values mean, `limits` in which colour."""
    mapping: list[ValueMapping] = [ValueMap({value: ValueMappingResult(text=text) for value, text in texts.items()})]
    panel = (
        _titled(statetimeline.Panel(), title, description, units.NoUnit)
        .mappings(mapping)
        .thresholds(limits)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .show_value(VisibilityMode.NEVER)
        .legend(_legend())
    )
    if empty is not None:
        panel.no_value(empty)
    return panel.with_target(_range(query, "A")).build()


def table(title: str, description: str, *columns: Column, empty: str | None = None) -> Panel:
    """A row for each combination of labels that the expressions have in common."""
    panel = _titled(tables.Panel(), title, description, columns[0].unit)
    headers = {"Value" if len(columns) == 1 else f"Value #{letter}": each.header for each, letter in _lettered(columns)}
    organize = {"excludeByName": {"Time": True}, "renameByName": headers}
    panel.transformations(
        [DataTransformerConfig("merge", options={}), DataTransformerConfig("organize", options=organize)]
    )
    for column, letter in _lettered(columns):
        panel.with_target(_instant(column.expression, letter).format(PromQueryFormat.TABLE))
        panel.override_by_name(column.header, [DynamicConfigValue("unit", column.unit)])
    panel.sort_by([common.TableSortByFieldState().display_name(columns[0].header).desc(True)])
    if empty is not None:
        panel.no_value(empty)
    return panel.build()


def variable(name: str, description: str, query: str) -> dashboard.QueryVariable:
    """A choice of label values, all of them at first."""
    return (
        dashboard.QueryVariable(name)
        .description(description)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def board(
    name: str, title: str, description: str, *rows: Row, variables: Sequence[dashboard.QueryVariable] = ()
) -> Dashboard:
    """`name` is the file's, and the end of the address at which Grafana shows the board."""
    datasource = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    built = (
        dashboard.Dashboard(f"Sessiongate: {title}")
        .uid(f"{TAG}-{name}")
        .description(description)
        .tags([TAG])
        .readonly()
        .time("now-6h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .variables([datasource, *variables])
        .annotations([*_ANNOTATIONS])
        .links([*_LINKS])
        .build()
    )
    built.panels = _laid_out(rows)
    return built


def render(board: Dashboard) -> str:
    """The board as a file that Grafana loads."""
    return json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _titled(panel: _Builder, title: str, description: str, unit: str) -> _Builder:
    return panel.title(title).description(description).datasource(DATASOURCE).unit(unit)


def _range(query: Query, letter: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().range().expr(query.expression).legend_format(query.legend)
    return target.exemplar(query.exemplars).ref_id(letter).datasource(DATASOURCE)


def _instant(expression: str, letter: str) -> prometheus.Dataquery:
    """Of this moment alone: the last point of a range may be of a process that is gone."""
    return prometheus.Dataquery().instant().expr(expression).ref_id(letter).datasource(DATASOURCE)


_Lettered = TypeVar("_Lettered", Query, Column)


def _lettered(queries: Sequence[_Lettered]) -> list[tuple[_Lettered, str]]:
    return list(zip(queries, string.ascii_uppercase, strict=False))


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
    )


def _laid_out(rows: Sequence[Row]) -> list[Panel | RowPanel]:
    """The panels from top to bottom, each with its number and its place."""
    panels: list[Panel | RowPanel] = []
    y = 0
    for row in rows:
        panels.append(RowPanel(title=row.title, id_val=len(panels) + 1, grid_pos=GridPos(h=1, w=COLUMNS, x=0, y=y)))
        y += 1
        for line in row.lines:
            edges = [COLUMNS * position // len(line) for position in range(len(line) + 1)]
            height = STAT_HEIGHT if all(panel.type_val == "stat" for panel in line) else GRAPH_HEIGHT
            for panel, (left, right) in zip(line, pairwise(edges), strict=True):
                panel.id_val = len(panels) + 1
                panel.grid_pos = GridPos(h=height, w=right - left, x=left, y=y)
                panel.links = _runbook_links(panel)
                panels.append(panel)
            y += height
    return panels


def _runbook_links(panel: Panel) -> list[DashboardLink]:
    expressions = [target.expr for target in panel.targets or () if isinstance(target, Dataquery)]
    return [
        _link(title, DashboardLinkType.LINK).url(url).target_blank(True).build()
        for title, url in runbooks(expressions).items()
    ]


def _link(title: str, kind: DashboardLinkType) -> dashboard.DashboardLink:
    return dashboard.DashboardLink(title).type(kind).placement("").keep_time(True)


_LINKS: Final = (
    _link("Boards", DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(True),
    _link("Runbooks", DashboardLinkType.LINK).icon("doc").url(INDEX).target_blank(True),
)


def _annotation(name: str, colour: str, expression: str, text: str) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color(colour)
        .expr(expression)
        .title_format(name)
        .text_format(text)
        .step("60s")
    )


_ANNOTATIONS: Final = (
    _annotation("Alert", "red", 'ALERTS{alertstate="firing", severity=~"critical|high"}', "{{alertname}}"),
    _annotation(
        "New version",
        "blue",
        "count by (service, version) (build_info) unless count by (service, version) (build_info offset 5m)",
        "{{service}} {{version}}",
    ),
)
