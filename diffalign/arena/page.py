"""``results.json`` of an arena -> one self-contained HTML page, and its main charts as SVG files. Torch-free.

Markup lives in ``templates/arena.html.j2``, which gets finished text and coordinates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from diffalign.arena.results import Answer, ArenaResults, EntryResult, Moment, Reach, headline, ratio_text, read
from diffalign.charts import MOST_LINES, Forest, Panel, Point, bounds, count, forest, panel, tick, ticks
from diffalign.config.arena import BASE
from diffalign.files import replacing
from diffalign.pages import render
from diffalign.results import Shown, Verdict, number, shown, verdict

PAGE = "arena.html"
EVALUATIONS = "network evaluations"


class Metric(NamedTuple):
    """What a row of charts shows."""

    key: str
    title: str
    value: Callable[[Moment], float]


class Across(NamedTuple):
    """A horizontal axis: where a moment is, and the places and texts of ticks up to the last one."""

    key: str
    title: str
    value: Callable[[Moment], float]
    ticks: Callable[[float], list[tuple[float, str]]]


def _even(text: Callable[[float], str]) -> Callable[[float], list[tuple[float, str]]]:
    return lambda last: [(at, text(at)) for at in ticks(0.0, last or 1.0)]


AXES = {
    "evaluations": Across("evaluations", EVALUATIONS, lambda one: one.evaluations, _even(count)),
    "seconds": Across("seconds", "seconds of training", lambda one: one.seconds, _even(tick)),
    "kl": Across(
        "kl",
        "KL to the base (drawn by its square root)",
        lambda one: math.sqrt(max(one.kl.mean, 0.0)),
        lambda last: [(math.sqrt(at), tick(at)) for at in ticks(0.0, last**2 or 1.0, most=4)],
    ),
}


def write(source: Path) -> Path:
    """Write the page and its charts beside ``results.json``; returns the page.

    Raises:
        UserError: the file is absent or not the results of an arena.
    """
    results = read(source)
    out = source.with_name(PAGE)
    with replacing(out) as handle:
        handle.write(page(results).encode())
    plots(results, source.parent / "charts")
    return out


def plots(results: ArenaResults, folder: Path) -> list[Path]:
    """Write the main charts as files of their own."""
    named: dict[str, Panel | Forest] = {
        f"{one.title} by {row.axis.key}": one for row in _rows(results) for one in row.panels
    }
    plot = _forest(results)
    paths = []
    for name, one in {**named, **({"differences": plot} if plot else {})}.items():
        paths.append(folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.svg")
        with replacing(paths[-1], durable=False) as handle:
            handle.write(render("plot.svg.j2", plot=one).strip().encode())
    return paths


def page(results: ArenaResults) -> str:
    """The page."""
    finished = [one for one in results.ranked() if one.final]
    return render(
        "arena.html.j2",
        title=results.title,
        results=results,
        headline=headline(results),
        columns=[results.main, *(label for label in results.labels if label != results.main)],
        rows=[_row(results, one) for one in finished],
        failed=[one for one in results.entries if not one.final],
        half_width=_half_width(finished, results.main),
        questions=_questions(results),
        forest=_forest(results),
        charts=_rows(results),
        peaks=_peaks(finished),
        titles=results.titles(),
        settings={name: _plain(value) for name, value in results.settings.items()},
    )


# --- tables -------------------------------------------------------------------------------------------------------


class TableRow(NamedTuple):
    """An entry at its end, as text."""

    found: EntryResult
    final: Moment
    scores: dict[str, Shown | None]
    difference: Shown | None
    verdict: Verdict


def _row(results: ArenaResults, one: EntryResult) -> TableRow:
    assert one.final
    main = one.final.scores[results.main]
    return TableRow(
        one,
        one.final,
        {label: shown(score.policy, score.interval) for label, score in one.final.scores.items()},
        shown(main.difference, main.difference_interval, sign=True),
        verdict(main.difference_interval),
    )


def _half_width(finished: Sequence[EntryResult], main: str) -> str:
    """Of a typical interval; empty without any."""
    intervals = [one.final.scores[main].interval for one in finished if one.final]
    return number(median((high - low) / 2 for low, high in intervals), 3) if intervals else ""


def _peaks(finished: Sequence[EntryResult]) -> dict[str, Any]:
    """Entries that over-optimise with their fall, those that do not, and those of which it cannot be told."""
    seen = [one for one in finished if one.peak and one.peak.updates is not None]
    return {
        "seen": [(one, shown(one.peak.change, one.peak.change_interval, sign=True)) for one in seen if one.peak],
        "unseen": [one.entry.title for one in finished if one.peak and one.peak.updates is None],
        "unknown": [one.entry.title for one in finished if one.peak is None],
    }


def _plain(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- questions ----------------------------------------------------------------------------------------------------


class ReachRow(NamedTuple):
    """An entry's way to a score, as text."""

    name: str
    evaluations: str
    seeds: str
    ratio: str


class Question(NamedTuple):
    """A question with all of its answers and the curves that they are about."""

    text: str
    answers: list[Answer]
    reaches: list[tuple[Reach, list[ReachRow]]]
    charts: list[Panel]


def _questions(results: ArenaResults) -> list[Question]:
    """In the order in which they were asked, those about network evaluations first."""
    texts = [one.target.question for one in results.reaches] + [one.contrast.question for one in results.contrasts]
    found = []
    for text in dict.fromkeys(texts):
        answers = [one for one in results.contrasts if one.contrast.question == text]
        reaches = [one for one in results.reaches if one.target.question == text]
        found.append(
            Question(
                text,
                answers,
                [(one, _reach_rows(results, one)) for one in reaches],
                _question_charts(results, answers, reaches),
            )
        )
    return found


def _reach_rows(results: ArenaResults, reach: Reach) -> list[ReachRow]:
    """The quickest first, those that never arrive last."""
    names = results.titles()
    ordered = sorted(reach.rows, key=lambda row: math.inf if row.evaluations is None else row.evaluations)
    return [
        ReachRow(names[row.entry], _arrival(row.evaluations), ", ".join(map(_arrival, row.seeds)), ratio_text(row))
        for row in ordered
    ]


def _arrival(evaluations: float | None) -> str:
    return "never" if evaluations is None else count(evaluations)


def _question_charts(results: ArenaResults, answers: Sequence[Answer], reaches: Sequence[Reach]) -> list[Panel]:
    """One per label that the question compares on."""
    asked = [(one.contrast.label, (one.contrast.first, one.contrast.second)) for one in answers]
    asked += [(one.target.label, (*one.target.asked, one.target.of, one.target.reference or BASE)) for one in reaches]
    charts = []
    for label in dict.fromkeys(label for label, _ in asked):
        wanted = dict.fromkeys(name for own, names in asked if own == label for name in names if name != BASE)
        entries = [one for one in results.entries if one.entry.name in wanted and one.final][:MOST_LINES]
        guides = {results.base.scores[label].policy: "the base"}
        for one in reaches:
            if one.target.label == label and one.target.of == BASE and one.value is not None:
                guides[one.value] = f"the base, {results.labels[one.target.score].title}"
        metric = _metric(results, label)
        drawn = any(label in moment.scores for one in entries for moment in one.moments[:-1])
        if drawn and (reaches or len(entries) > 1):
            own = list(guides.items())
            charts.append(_panel(results, metric.title, entries, entries, metric, AXES["evaluations"], own))
    return charts


# --- charts -------------------------------------------------------------------------------------------------------


class ChartRow(NamedTuple):
    """Charts of one metric against one axis; those of one group share the vertical axis."""

    metric: str
    axis: Across
    panels: list[Panel]


def _metric(results: ArenaResults, label: str) -> Metric:
    def value(moment: Moment) -> float:
        return moment.scores[label].policy if label in moment.scores else math.nan

    return Metric(label, results.labels[label].title, value)


def _rows(results: ArenaResults) -> list[ChartRow]:
    """Every metric against network evaluations and seconds, and the ranked score against the divergence."""
    moments = [moment for one in results.entries for moment in one.moments[:-1]]
    labels = [label for label in results.labels if any(label in moment.scores for moment in moments)]
    metrics = [_metric(results, label) for label in sorted(labels, key=lambda label: label != results.main)]
    metrics.append(Metric("diversity", "diversity", lambda one: one.diversity.mean))
    metrics.append(Metric("kl", "KL to the base", lambda one: one.kl.mean))
    pairs = [(metric, AXES[key]) for key in ("evaluations", "seconds") for metric in metrics]
    rows = []
    for metric, axis in [*pairs[: len(metrics)], (_metric(results, results.main), AXES["kl"]), *pairs[len(metrics) :]]:
        guide = [(metric.value(results.base), "the base")]
        panels = [
            _panel(results, f"{metric.title}{part}", entries, scale, metric, axis, guide)
            for part, entries, scale in _parts(results.entries)
        ]
        rows.append(ChartRow(metric.title, axis, panels))
    return [row for row in rows if row.panels]


def _parts(entries: Sequence[EntryResult]) -> Iterator[tuple[str, list[EntryResult], list[EntryResult]]]:
    """Finished entries by group, as evenly as they go into charts that can be read, with all of their group."""
    finished = [one for one in entries if one.final]
    for group in dict.fromkeys(one.entry.group for one in finished):
        own = [one for one in finished if one.entry.group == group]
        charts = math.ceil(len(own) / MOST_LINES)
        size = math.ceil(len(own) / charts)
        for start in range(0, len(own), size):
            part = f" ({start // size + 1} of {charts})" if charts > 1 else ""
            yield f": {group}{part}" if group else part, own[start : start + size], own


def _panel(
    results: ArenaResults,
    title: str,
    entries: Sequence[EntryResult],
    scale: Sequence[EntryResult],
    metric: Metric,
    axis: Across,
    guides: Sequence[tuple[float, str]],
) -> Panel:
    """The lines of the entries, on a vertical axis that holds those of ``scale``."""

    def at(moment: Moment) -> Point:
        return axis.value(moment), metric.value(moment)

    def points(one: EntryResult) -> list[Point]:
        return [point for point in map(at, [results.base, *one.moments]) if math.isfinite(point[1])]

    everyone = [y for one in scale for _, y in points(one)]
    last = max(axis.value(moment) for one in entries for moment in one.moments)
    marks = {one.entry.title: _marks(results, one, at) for one in entries} if axis.key == "kl" else {}
    return panel(
        title,
        {one.entry.title: points(one) for one in entries},
        axis.title,
        bounds([*everyone, *(value for value, _ in guides)], pad=0.08),
        axis.ticks(last),
        guides,
        marks,
    )


def _marks(results: ArenaResults, one: EntryResult, at: Callable[[Moment], Point]) -> dict[str, Point]:
    """The best moment and that at which over-optimisation is seen, where it is."""
    if one.peak is None or one.peak.updates is None:
        return {}
    moments = {moment.updates: moment for moment in [results.base, *one.moments]}
    return {"best": at(moments[one.peak.best_updates]), "onset": at(moments[one.peak.updates])}


def _forest(results: ArenaResults) -> Forest | None:
    """Final differences to the base, the highest first; None if nothing finished."""
    rows = []
    for one in results.ranked():
        if one.final:
            row = _row(results, one)
            assert row.difference
            rows.append((one.entry.title, row.verdict, row.difference.ends, row.difference.value))
    label = results.labels[results.main].title
    return forest(f"{label}: difference to the base at the end", rows) if rows else None
