"""Answers to an arena's questions: paired contrasts of final scores, and the price of reaching a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffalign.arena.results import (
    Answer,
    EntryResult,
    Label,
    Reach,
    Reached,
    contrast_text,
    reach_text,
    titles,
)
from diffalign.arena.scores import Scores, measured
from diffalign.comparison import over_seeds
from diffalign.config.arena import BASE, Contrast, Target
from diffalign.errors import UserError
from diffalign.results import number


def answer(contrast: Contrast, entries: Sequence[EntryResult], scores: Scores, labels: Mapping[str, Label]) -> Answer:
    """The paired difference of two final scores over the seeds that both finished."""
    names = titles([one.entry for one in entries])
    own = {one.entry.name: one.seeds for one in entries}
    for name in (contrast.first, contrast.second):
        if name != BASE and not own[name]:
            return Answer(contrast=contrast, text=f"Cannot be answered: {names[name]} finished no run.")
    first, second = contrast.first, contrast.second
    other = contrast.second_label or contrast.label
    if scores.sizes[contrast.label] != scores.sizes[other]:
        raise UserError(f"{contrast.question}: {contrast.label} and {other} were not judged on the same prompts")
    seeds = [seed for seed in own[first] if second == BASE or seed in own[second]]
    if not seeds:
        return Answer(contrast=contrast, text=f"Cannot be answered: {names[first]} and {names[second]} share no seed.")
    difference = measured(
        scores.final(first, contrast.label).of([own[first].index(seed) for seed in seeds]),
        scores.final(second, other).of([0] if second == BASE else [own[second].index(seed) for seed in seeds]),
    )
    text = contrast_text(contrast, difference, len(seeds), names, dict(labels))
    return Answer(contrast=contrast, seeds=seeds, difference=difference, text=text)


def crossing(x: np.ndarray, curve: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    """Where curves first reach a target, straight between their points; infinity where they never do.

    Args:
        x: (points,), ascending.
        curve: (points, N).
        target: (N,), or one for all.
    """
    above = curve >= target
    first = above.argmax(axis=0)
    before, column = np.maximum(first - 1, 0), np.arange(curve.shape[1])
    low, high = curve[before, column], curve[first, column]
    share = np.divide(target - low, high - low, out=np.zeros(len(column)), where=high > low)
    at = np.where(first > 0, x[before] + share * (x[first] - x[before]), x[0])
    return np.where(above.any(axis=0), at, np.inf)


def reach(target: Target, entries: Sequence[EntryResult], scores: Scores, labels: Mapping[str, Label]) -> Reach:
    """After how many network evaluations everyone reaches a score, and how many times as many the reference takes."""
    names = titles([one.entry for one in entries])
    finished = {one.entry.name: one for one in entries if one.final}
    if target.of != BASE and target.of not in finished:
        return Reach(target=target, value=None, texts=[f"Cannot be answered: {names[target.of]} finished no run."])
    goal = scores.final(target.of, target.score)
    start = scores.base[target.label].mean()
    if goal.mean() <= start:
        text = f"There is nothing to reach: the score is {number(goal.mean())}, the base starts at {number(start)}."
        return Reach(target=target, value=goal.mean(), texts=[text])
    drawn = over_seeds(goal.draws)
    ways = {name: _way(one, scores, target.label, goal.mean(), drawn) for name, one in finished.items()}
    reference = ways.get(target.reference or "")
    rows = [_reached(name, way, reference) for name, way in ways.items()]
    found = {row.entry: row for row in rows}
    texts = [
        f"The score to reach is {number(goal.mean())}, the final {labels[target.score].title} of {names[target.of]}."
    ]
    for name in target.asked:
        if name not in found:
            texts.append(f"{names[name]} finished no run.")
            continue
        final = finished[name].final
        assert final
        texts.append(reach_text(found[name], found.get(target.reference or ""), final.evaluations, names))
    return Reach(target=target, value=goal.mean(), rows=rows, texts=texts)


class _Way(NamedTuple):
    """Network evaluations until a score: of the mean curve, of every seed's, and of every resample's; or infinity."""

    mean: float
    seeds: np.ndarray
    draws: np.ndarray


def _way(one: EntryResult, scores: Scores, label: str, goal: float, drawn: np.ndarray) -> _Way:
    name, curve = one.entry.name, scores.curve(one.entry.name, label)
    x = np.array([0.0, *(one.moments[index].evaluations for index in scores.measured_at(name, label))])
    own = np.stack([np.broadcast_to(score.values, len(one.seeds)) for score in curve])
    draws = np.stack([over_seeds(score.draws) for score in curve])
    mean = crossing(x, own.mean(axis=1, keepdims=True), goal)
    return _Way(float(mean[0]), crossing(x, own, goal), crossing(x, draws, drawn))


def _reached(name: str, way: _Way, reference: _Way | None) -> Reached:
    seeds = [float(at) if np.isfinite(at) else None for at in way.seeds]
    row = Reached(entry=name, evaluations=way.mean if np.isfinite(way.mean) else None, seeds=seeds)
    if reference is None or reference is way or not np.isfinite([way.mean, reference.mean]).all():
        return row
    ratios = _ratios(reference.draws, way.draws)
    low, high = (float(end) for end in np.quantile(ratios, [0.025, 0.975], method="nearest"))
    return row.model_copy(
        update={
            "ratio": reference.mean / way.mean,
            "ratio_interval": (low, high if np.isfinite(high) else None) if np.isfinite(low) else None,
        }
    )


def _ratios(reference: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Of every resample in which one of the two reaches the score: 0 where only the reference does, else infinity."""
    known = np.isfinite(reference) | np.isfinite(own)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = reference[known] / own[known]
    return ratios[~np.isnan(ratios)]
