"""Scores of many runs on the same held-out prompts, and their paired intervals over prompts and seeds.

Two things are resampled together, prompts (within their task, the same ones for every model) and seeds: an interval
says how far another draw of held-out prompts and of seeds could move the number. It errs to the wide side where seeds
disagree prompt by prompt (arXiv:0712.1111), and with three seeds it is rough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffalign.arena.results import Scored
from diffalign.comparison import Outcomes, bootstrap, common, interval, means, over_seeds
from diffalign.config.arena import BASE


class Snapshot(NamedTuple):
    """A model on the way, judged on the held-out prompts from the same noise as every other."""

    updates: int
    evaluations: int
    """Of the network so far: forward 1, backward 2, per sample."""
    seconds: float
    outcomes: Mapping[str, Outcomes]
    """label -> outcomes; a label may be absent before the last snapshot."""
    kl: float
    """To the base."""
    diversity: float


class Cell(NamedTuple):
    """One run: an entry with a seed. With a reason for its failure it counts for nothing else."""

    entry: str
    seed: int
    snapshots: Sequence[Snapshot]
    error: str = ""


class Score(NamedTuple):
    """One label at one moment: every seed's value, and its bootstrap draws (seeds, RESAMPLES)."""

    values: np.ndarray
    draws: np.ndarray

    def of(self, seeds: Sequence[int]) -> Score:
        """Of these seeds alone, by index."""
        return Score(self.values[list(seeds)], self.draws[list(seeds)])

    def mean(self) -> float:
        """Over seeds."""
        return float(self.values.mean())


def measured(one: Score, other: Score | None = None) -> Scored:
    """The mean over seeds with its interval, and the paired difference to the other."""
    draws = over_seeds(one.draws)
    row: dict[str, Any] = {"policy": one.mean(), "interval": interval(draws), "seeds": one.values.tolist()}
    if other is not None:
        before = over_seeds(other.draws)
        row |= {
            "against": other.mean(),
            "against_interval": interval(before),
            "difference": one.mean() - other.mean(),
            "difference_interval": interval(draws - before),
        }
    return Scored.model_validate(row)


class Scores:
    """Every label of every finished run, judged together."""

    def __init__(self, base: Snapshot, runs: Mapping[str, Sequence[Cell]]) -> None:
        self.base: dict[str, Score] = {}
        self.at: dict[tuple[str, int, str], Score] = {}  # (entry, moment, label)
        self.left_out: dict[str, int] = {}
        self.sizes: dict[str, dict[str, dict[str, int]]] = {}
        for label in base.outcomes:
            self._judge(label, base, runs)

    def _judge(self, label: str, base: Snapshot, runs: Mapping[str, Sequence[Cell]]) -> None:
        keys = [(name, index) for name, cells in runs.items() for index in _with_label(cells, label)]
        found = [cell.snapshots[index].outcomes[label] for name, index in keys for cell in runs[name]]
        kept, self.left_out[label] = common(base.outcomes[label], *found)
        self.sizes[label] = {t: {p: len(values) for p, values in ps.items()} for t, ps in kept[0].items()}
        values, draws = np.array([means(one)["overall"] for one in kept]), bootstrap(*kept)["overall"]
        self.base[label] = Score(values[:1], draws[:1])
        row = 1
        for name, index in keys:
            seeds = slice(row, row + len(runs[name]))
            self.at[name, index, label] = Score(values[seeds], draws[seeds])
            row = seeds.stop

    def measured_at(self, name: str, label: str) -> list[int]:
        """The moments at which an entry has the label."""
        return sorted(index for entry, index, one in self.at if (entry, one) == (name, label))

    def final(self, name: str, label: str) -> Score:
        """An entry's last score, or the base's."""
        return self.base[label] if name == BASE else self.at[name, self.measured_at(name, label)[-1], label]

    def curve(self, name: str, label: str) -> list[Score]:
        """The base's score and then that of every moment that has the label."""
        return [self.base[label], *(self.at[name, index, label] for index in self.measured_at(name, label))]


def _with_label(cells: Sequence[Cell], label: str) -> list[int]:
    """Moments at which every seed has the label."""
    return [i for i in range(len(cells[0].snapshots)) if all(label in cell.snapshots[i].outcomes for cell in cells)]
