"""Geometry of the report's charts: numbers in, SVG coordinates and tick labels out. Pure, standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
