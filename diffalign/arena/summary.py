"""Runs of an arena -> its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from diffalign import comparison
from diffalign.arena.answers import answer, reach
from diffalign.arena.results import (
    ArenaResults,
    Entry,
    EntryResult,
    Failure,
    Label,
    Moment,
    Peak,
    Scored,
    Spread,
)
from diffalign.arena.scores import Cell, Score, Scores, Snapshot, measured
from diffalign.config.arena import BASE, Contrast, Target
from diffalign.errors import UserError
from diffalign.overoptimisation import onset


def summarise(
    title: str,
    base: Snapshot,
    entries: Sequence[Entry],
    cells: Sequence[Cell],
    *,
    labels: Mapping[str, Label],
    contrasts: Sequence[Contrast] = (),
    targets: Sequence[Target] = (),
    main: str = "correct",
    trained: str = "graded",
    **described: Any,
) -> ArenaResults:
    """The results of an arena.

    Args:
        title: of the page.
        base: the model that all runs start from, with every label, 0 updates and no divergence.
        entries: in the order of the charts.
        cells: their runs; the seeds of an entry measured at the same moments.
        labels: what the labels of the outcomes are, in the order of the table's columns.
        contrasts: questions about final scores.
        targets: questions about the network evaluations that a score takes.
        main: label that entries are ranked by; held out.
        trained: label of the reward that was trained on, to see over-optimisation.
        described: the other fields of :class:`ArenaResults`.

    Raises:
        UserError: names or labels that are not there, or runs that were not judged alike.
    """
    _check(base, entries, cells, labels, contrasts, targets, (main, trained))
    runs, failures = _sorted_out(entries, cells, labels)
    scores = Scores(base, runs)
    found = [_entry(entry, runs.get(entry.name, []), failures[entry.name], scores, main, trained) for entry in entries]
    found = _against_best(found, scores, main)
    sizes = scores.sizes[main]
    return ArenaResults(
        title=title,
        main=main,
        trained=trained,
        labels=dict(labels),
        n=sum(sum(prompts.values()) for prompts in sizes.values()),
        prompts=sum(len(prompts) for prompts in sizes.values()),
        failed=scores.left_out[main],
        seeds=sorted({cell.seed for cell in cells}),
        resamples=comparison.RESAMPLES,
        base=_moment([base], {label: measured(score) for label, score in scores.base.items()}),
        entries=found,
        contrasts=[answer(contrast, found, scores, labels) for contrast in contrasts],
        reaches=[reach(target, found, scores, labels) for target in targets],
        **described,
    )


def _check(
    base: Snapshot,
    entries: Sequence[Entry],
    cells: Sequence[Cell],
    labels: Mapping[str, Label],
    contrasts: Sequence[Contrast],
    targets: Sequence[Target],
    own: Sequence[str],
) -> None:
    """Every name that is used is one that is there."""
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names) or BASE in names:
        raise UserError(f"entries: names must differ from one another and from {BASE!r}, got {', '.join(names)}")
    pairs = [(cell.entry, cell.seed) for cell in cells]
    if len(set(pairs)) < len(pairs):
        raise UserError("cells: an entry has two runs of one seed")
    asked = {name for one in contrasts for name in (one.first, one.second)}
    asked |= {name for one in targets for name in (one.of, one.reference or BASE, *one.asked)}
    for name in sorted(asked | {cell.entry for cell in cells}):
        if name not in (BASE, *names):
            raise UserError(f"no entry {name!r}; there are {', '.join(names)}")
    wanted = {label for one in contrasts for label in (one.label, one.second_label or one.label)}
    wanted |= {label for one in targets for label in (one.label, one.score)} | set(own) | set(base.outcomes)
    for label in sorted(wanted | set(labels)):
        if label not in labels or label not in base.outcomes:
            raise UserError(f"label {label!r}: needs a description and the base's outcomes")


def _sorted_out(
    entries: Sequence[Entry], cells: Sequence[Cell], labels: Mapping[str, Label]
) -> tuple[dict[str, list[Cell]], dict[str, list[Failure]]]:
    """Finished runs by entry, in the order of their seeds, and the failures of every entry."""
    runs: dict[str, list[Cell]] = {}
    failures: dict[str, list[Failure]] = {entry.name: [] for entry in entries}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        reason = _broken(cell, labels)
        if reason:
            failures[cell.entry].append(Failure(seed=cell.seed, reason=reason))
        else:
            runs.setdefault(cell.entry, []).append(cell)
    for name, own in runs.items():
        if len({tuple(one.updates for one in cell.snapshots) for cell in own}) > 1:
            raise UserError(f"{name}: its seeds were measured after different numbers of updates")
    return runs, failures


def _broken(cell: Cell, labels: Mapping[str, Label]) -> str:
    """Why a run cannot be counted; empty if it can."""
    if cell.error or not cell.snapshots:
        return cell.error or "no snapshot"
    for one in cell.snapshots:
        if not (math.isfinite(one.kl) and math.isfinite(one.diversity)):
            return f"divergence or diversity is not a number after {one.updates} updates"
        for label, tasks in one.outcomes.items():
            if not comparison.is_judged(tasks):
                return f"no sample could be judged ({label}) after {one.updates} updates"
    missing = [label for label in labels if label not in cell.snapshots[-1].outcomes]
    return f"the last snapshot lacks {', '.join(missing)}" if missing else ""


def _entry(
    entry: Entry, cells: Sequence[Cell], failures: list[Failure], scores: Scores, main: str, trained: str
) -> EntryResult:
    if not cells:
        failures = failures or [Failure(seed=0, reason="never run")]
        return EntryResult(entry=entry, seeds=[], failures=failures)
    moments = []
    for index in range(len(cells[0].snapshots)):
        own = {label: scores.at.get((entry.name, index, label)) for label in scores.base}
        rows = {label: measured(score, scores.base[label]) for label, score in own.items() if score}
        moments.append(_moment([cell.snapshots[index] for cell in cells], rows))
    return EntryResult(
        entry=entry,
        seeds=[cell.seed for cell in cells],
        failures=failures,
        moments=moments,
        peak=_peak(moments, scores.curve(entry.name, main), scores.curve(entry.name, trained)),
    )


def _moment(snapshots: Sequence[Snapshot], rows: dict[str, Scored]) -> Moment:
    def spread(values: list[float]) -> Spread:
        return Spread(mean=fmean(values), seeds=values)

    return Moment(
        updates=snapshots[0].updates,
        evaluations=fmean(one.evaluations for one in snapshots),
        seconds=fmean(one.seconds for one in snapshots),
        scores=rows,
        kl=spread([one.kl for one in snapshots]),
        diversity=spread([one.diversity for one in snapshots]),
    )


def _peak(moments: Sequence[Moment], held_out: Sequence[Score], trained: Sequence[Score]) -> Peak | None:
    """Over-optimisation by the rule of :func:`diffalign.overoptimisation.onset`, the base as the start."""
    if not len(moments) == len(held_out) - 1 == len(trained) - 1:
        return None  # a label was not measured at every moment
    best, start = onset(
        range(len(held_out)),
        lambda step, best: measured(held_out[step], held_out[best]),
        lambda step, best: measured(trained[step], trained[best]),
    )
    reached = moments[best - 1] if best else None
    row: dict[str, Any] = {
        "best_updates": reached.updates if reached else 0,
        "best_kl": reached.kl.mean if reached else 0.0,
        "best_score": held_out[best].mean(),
    }
    if start is not None:
        fall = measured(held_out[start], held_out[best])
        row |= {"updates": moments[start - 1].updates, "kl": moments[start - 1].kl.mean}
        row |= {"change": fall.difference, "change_interval": fall.difference_interval}
    return Peak.model_validate(row)


def _against_best(entries: Sequence[EntryResult], scores: Scores, main: str) -> list[EntryResult]:
    """With everyone's difference to the entry that ends highest."""
    finished = {one.entry.name: scores.final(one.entry.name, main) for one in entries if one.final}
    if not finished:
        return list(entries)
    best = max(finished, key=lambda name: finished[name].mean())

    def to_best(name: str) -> Scored | None:
        return measured(finished[name], finished[best]) if name in finished and name != best else None

    return [one.model_copy(update={"to_best": to_best(one.entry.name)}) for one in entries]
