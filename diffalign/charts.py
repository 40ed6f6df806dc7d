"""Geometry of the charts of the pages: numbers in, SVG coordinates and tick labels out. Pure, standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

WIDTH, HEIGHT = 400, 180
LEFT, RIGHT, TOP, BOTTOM = 52.0, 392.0, 10.0, 152.0  # the plotting area
MAX_POINTS = 400

Point = tuple[float, float]


class Tick(NamedTuple):
    """A place on an axis, in chart coordinates, with its text."""

    at: float
    text: str


class Line(NamedTuple):
    """One series: SVG path data of every point and of the running mean."""

    name: str
    raw: str
    smooth: str


class Chart(NamedTuple):
    """A finished line chart."""

    title: str
    note: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    guide: Tick | None
    """A horizontal line of reference, such as chance level."""


class Histogram(NamedTuple):
    """Counts of equal bins over [low, high]; ``heights`` are relative to the fullest bin."""

    low: float
    high: float
    mean: float
    count: int
    heights: list[float]


def tick(value: float) -> str:
    """A number on an axis, as short as it goes."""
    return f"{value:.6g}".replace("-", "−")


def count(value: float) -> str:
    """A large number to three digits: ``950``, ``12.5 k``, ``1.2 M``."""
    for power, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * power:
            return f"{float(f'{value / power:.3g}'):g}{unit}"
    return f"{value:.3g}" if value < 1 else f"{value:.0f}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def bounds(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    """The range of the values with some space around it, never empty."""
    low, high = min(values), max(values)
    space = pad * (high - low) or max(abs(high), 1.0) * pad
    return low - space, high + space


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most so many points: means of equal runs of neighbours."""
    size = math.ceil(len(points) / most)
    runs = (points[start : start + size] for start in range(0, len(points), max(size, 1)))
    return [(fmean(x for x, _ in run), fmean(y for _, y in run)) for run in runs]


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Mean over ``window`` points around each, of those there are near the ends."""
    reach = window // 2
    near = (points[max(0, index - reach) : index + reach + 1] for index in range(len(points)))
    return [(x, fmean(y for _, y in run)) for (x, _), run in zip(points, near, strict=True)]


def path(points: Sequence[Point], x: tuple[float, float], y: tuple[float, float]) -> str:
    """SVG path data; a value that is not finite breaks the line."""
    parts = []
    for finite, run in groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            corners = [f"{_across(px, x):.1f} {_up(py, y):.1f}" for px, py in run]
            parts.append(f"M{'L'.join(corners)}")
    return "".join(parts)


def _across(value: float, axis: tuple[float, float]) -> float:
    return LEFT + (value - axis[0]) / (axis[1] - axis[0]) * (RIGHT - LEFT)


def _up(value: float, axis: tuple[float, float]) -> float:
    return BOTTOM - (value - axis[0]) / (axis[1] - axis[0]) * (BOTTOM - TOP)


def chart(
    title: str, series: dict[str, list[Point]], note: str = "", guide: tuple[float, str] | None = None
) -> Chart | None:
    """A line chart of the series that hold a finite point; None when none does.

    Args:
        title: what the y axis shows.
        series: name -> (x, y) with ascending x.
        note: how to read it.
        guide: a horizontal line and its name.
    """
    series = {name: points for name, points in series.items() if any(math.isfinite(y) for _, y in points)}
    if not series:
        return None
    values = [y for points in series.values() for _, y in points if math.isfinite(y)]
    steps = [x for points in series.values() for x, _ in points]
    x_axis = (min(steps), max(max(steps), min(steps) + 1))
    y_axis = bounds([*values, guide[0]] if guide else values)
    lines = []
    for name, points in series.items():
        thinned = thin(points)
        smooth = running_mean(thinned, window=max(1, len(thinned) // 12))
        lines.append(Line(name, path(thinned, x_axis, y_axis), path(smooth, x_axis, y_axis)))
    return Chart(
        title,
        note,
        [Tick(_across(at, x_axis), tick(at)) for at in ticks(*x_axis)],
        [Tick(_up(at, y_axis), tick(at)) for at in ticks(*y_axis, most=5)],
        lines,
        guide and Tick(_up(guide[0], y_axis), guide[1]),
    )


def histogram(values: Sequence[float], bins: int = 20) -> Histogram:
    """The distribution of at least one value."""
    low, high = min(values), max(values)
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / ((high - low) or 1.0) * bins), bins - 1)] += 1
    return Histogram(low, high, fmean(values), len(values), [count / max(counts) for count in counts])


# --- panels of many lines -----------------------------------------------------------------------------------------

MOST_LINES = 8
"""Of a panel: so many colours can be told apart."""
LEGEND_ROW = 18
NARROW_NAME = 18  # characters of a name that fit half of the width


class Trace(NamedTuple):
    """One series of a panel: its line, its points, and the marked ones by kind."""

    name: str
    style: int
    path: str
    dots: list[Point]
    marks: dict[str, Point]
    key: Point
    """Where its entry of the legend begins."""


class Guide(NamedTuple):
    """A horizontal line of a panel with its place in the legend."""

    name: str
    at: float
    key: Point


class Panel(NamedTuple):
    """A finished chart of several lines with a legend below."""

    title: str
    x_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    guides: list[Guide]
    traces: list[Trace]
    height: int


def panel(
    title: str,
    series: Mapping[str, Sequence[Point]],
    x_title: str,
    y_axis: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
    guides: Sequence[tuple[float, str]] = (),
    marks: Mapping[str, Mapping[str, Point]] | None = None,
) -> Panel:
    """A chart of at most :data:`MOST_LINES` lines through few points each.

    Args:
        title: what the y axis shows.
        series: name -> (x, y) with ascending x, from 0 on.
        x_title: what the x axis shows.
        y_axis: its range; charts that are read together share it.
        x_ticks: (place, text).
        guides: horizontal lines and their names.
        marks: name -> kind of mark -> point.
    """
    x_axis = (0.0, max([x for points in series.values() for x, _ in points], default=0.0) or 1.0)

    def at(point: Point) -> Point:
        return round(_across(point[0], x_axis), 1), round(_up(point[1], y_axis), 1)

    names = [*series, *(name for _, name in guides)]
    columns = 1 if any(len(name) > NARROW_NAME for name in names) else 2

    def key(index: int) -> Point:
        row, column = divmod(index, columns)
        return LEFT + column * (RIGHT - LEFT) / 2, HEIGHT + 22.0 + LEGEND_ROW * row

    traces = []
    for index, (name, points) in enumerate(series.items()):
        own = {kind: at(point) for kind, point in (marks or {}).get(name, {}).items()}
        line = path(points, x_axis, y_axis)
        traces.append(Trace(name, index, line, [at(point) for point in points], own, key(index)))
    return Panel(
        title,
        x_title,
        [Tick(round(_across(value, x_axis), 1), text) for value, text in x_ticks],
        [Tick(round(_up(value, y_axis), 1), tick(value)) for value in ticks(*y_axis)],
        [Guide(name, at((0.0, value))[1], key(len(series) + n)) for n, (value, name) in enumerate(guides)],
        traces,
        HEIGHT + 16 + LEGEND_ROW * math.ceil(len(names) / columns),
    )


FOREST_LEFT, FOREST_RIGHT, FOREST_TOP, FOREST_ROW = 216.0, 346.0, 8, 22


class Branch(NamedTuple):
    """A row of a forest plot in chart coordinates."""

    name: str
    verdict: str
    low: float
    middle: float
    high: float
    at: float
    text: str


class Forest(NamedTuple):
    """Values with their intervals, one below the other."""

    title: str
    ticks: list[Tick]
    zero: float
    rows: list[Branch]
    bottom: float
    height: int


def forest(title: str, rows: Sequence[tuple[str, str, tuple[float, float, float], str]]) -> Forest:
    """A forest plot around 0 of (name, verdict, (low, value, high), text)."""
    axis = bounds([0.0, *(end for _, _, ends, _ in rows for end in ends)])

    def across(value: float) -> float:
        share = (value - axis[0]) / (axis[1] - axis[0])
        return round(FOREST_LEFT + share * (FOREST_RIGHT - FOREST_LEFT), 1)

    branches = []
    for index, (name, verdict, (low, middle, high), text) in enumerate(rows):
        at = FOREST_TOP + FOREST_ROW * (index + 0.5)
        branches.append(Branch(name, verdict, across(low), across(middle), across(high), at, text))
    bottom = FOREST_TOP + FOREST_ROW * len(rows)
    marks = [Tick(across(value), tick(value)) for value in ticks(*axis, most=4)]
    return Forest(title, marks, across(0.0), branches, bottom, bottom + 40)
