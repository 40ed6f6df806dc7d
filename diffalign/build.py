"""`diffalign build`: scored candidates -> training records (pairs or rankings) with ``labels["reward"]``.

The rules are pure functions of the rewards of one record. Letters: K candidates, U units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from diffalign import records
from diffalign.config import BuildConfig
from diffalign.errors import UserError
from diffalign.files import require_complete, siblings
from diffalign.records import Candidate, Record

Reward = float | list[float]
"""One number, or one per unit."""
How = Literal["sum", "wins"]
Rule = Literal["best_worst", "all_pairs", "ranked"]


class Choice(NamedTuple):
    """What a rule makes of one record."""

    groups: list[tuple[int, ...]]
    """Candidate indices of every training record, best first."""
    ties: int
    """Pairs (``all_pairs``) or records dropped because their rewards differ by no more than the margin."""


def combine(record: Record, weights: Mapping[str, float], how: How) -> list[Reward]:
    """The K rewards of a record from its labels; per unit when every label is a list of the same length.

    ``sum``: weighted sum. ``wins``: a candidate gets a label's weight for every other one it beats strictly, over the
    total weight and K - 1, so that rewards are in [0, 1] and sum to K / 2 without ties (RankDPO, arXiv:2410.18013,
    with weights). A negative weight turns a label around: lower is better.

    Raises:
        UserError: fewer than two candidates, a label is missing or does not fit the others, or a weight is unusable.
    """
    _check_weights(weights)
    if len(record.candidates) < 2:
        raise UserError(f"record {record.id!r} has {len(record.candidates)} candidates; rewards compare at least two")
    columns = {label: _column(record, label) for label in weights}
    lengths = {len(value) if isinstance(value, list) else None for column in columns.values() for value in column}
    if len(lengths) > 1:
        names = ", ".join(weights)
        raise UserError(f"record {record.id!r}: {names}: numbers mixed with lists, or lists of different lengths")
    reduce = _weighted_sum if how == "sum" else _count_wins
    units = lengths.pop()
    rewards: list[Reward] = []
    if units is None:
        rewards += reduce(columns, weights)
    else:
        by_unit = [reduce({label: [v[u] for v in c] for label, c in columns.items()}, weights) for u in range(units)]
        rewards += [list(row) for row in zip(*by_unit, strict=True)]
    if not all(math.isfinite(_level(reward)) for reward in rewards):
        raise UserError(f"record {record.id!r}: the reward is not finite ({rewards}); check labels and weights")
    return rewards


def _check_weights(weights: Mapping[str, float]) -> None:
    if not all(map(math.isfinite, weights.values())) or not any(weights.values()):
        raise UserError(f"reward weights {dict(weights)} must be finite and not all zero")


def _column(record: Record, label: str) -> list[Any]:
    """One label of all candidates."""
    for index, candidate in enumerate(record.candidates):
        if label not in candidate.labels:
            known = ", ".join(sorted(candidate.labels)) or "none"
            raise UserError(f"record {record.id!r}, candidate {index}: no label {label!r}; it has: {known}")
    return [candidate.labels[label] for candidate in record.candidates]


def _weighted_sum(columns: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    rows = zip(*columns.values(), strict=True)
    return [sum(w * value for w, value in zip(weights.values(), row, strict=True)) for row in rows]


def _count_wins(columns: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    k = len(next(iter(columns.values())))
    wins = [0.0] * k
    for label, column in columns.items():
        sign = math.copysign(1.0, weights[label])
        for i in range(k):
            wins[i] += abs(weights[label]) * sum(sign * column[i] > sign * other for other in column)
    total = sum(map(abs, weights.values())) * (k - 1)
    return [won / total for won in wins]


def _level(reward: Reward) -> float:
    """A reward as one number: the mean over its units."""
    return fmean(reward) if isinstance(reward, list) else reward


def best_worst(rewards: Sequence[Reward], margin: float) -> Choice:
    """One pair per record; the first of equals."""
    levels = [_level(reward) for reward in rewards]
    best, worst = levels.index(max(levels)), levels.index(min(levels))
    if levels[best] - levels[worst] <= margin:
        return Choice([], ties=1)
    return Choice([(best, worst)], ties=0)


def all_pairs(rewards: Sequence[Reward], margin: float, per_prompt: int | None = None) -> Choice:
    """Every pair whose rewards differ by more than the margin, widest first, at most ``per_prompt``."""
    levels = [_level(reward) for reward in rewards]
    pairs = [(i, j) if levels[i] > levels[j] else (j, i) for i, j in combinations(range(len(levels)), 2)]
    apart = [(i, j) for i, j in pairs if levels[i] - levels[j] > margin]
    widest = sorted(apart, key=lambda pair: levels[pair[1]] - levels[pair[0]])
    return Choice(list(widest[:per_prompt]), ties=len(pairs) - len(apart))


def ranked(rewards: Sequence[Reward], margin: float, top: int | None = None) -> Choice:
    """The ``top`` best candidates, best first; dropped when even the first and the last of them tie."""
    levels = [_level(reward) for reward in rewards]
    order = sorted(range(len(levels)), key=lambda index: -levels[index])[:top]
    if levels[order[0]] - levels[order[-1]] <= margin:
        return Choice([], ties=1)
    return Choice([tuple(order)], ties=0)


def curriculum(rewards: Sequence[Reward], stages: int) -> list[tuple[int, int] | None]:
    """A record's pair at each stage: the best candidate against the others, easy (widest gap) first (Curry-DPO).

    Candidates that tie with the best make no pair; stages beyond the pairs there are get None. Equal gaps keep their
    order. Each stage starts from, and refers to, the model of the one before (arXiv:2403.07230).
    """
    levels = [_level(reward) for reward in rewards]
    best = levels.index(max(levels))
    others = sorted((i for i, level in enumerate(levels) if level < levels[best]), key=levels.__getitem__)[:stages]
    return [*((best, other) for other in others), *[None] * (stages - len(others))]


def choose(rewards: Sequence[Reward], rule: Rule, margin: float, per_prompt: int | None, top: int | None) -> Choice:
    """Apply the rule of that name."""
    if rule == "best_worst":
        return best_worst(rewards, margin)
    if rule == "all_pairs":
        return all_pairs(rewards, margin, per_prompt)
    return ranked(rewards, margin, top)


def training_record(record: Record, rewards: Sequence[Reward], group: Sequence[int], rule: Rule) -> Record:
    """The candidates of a group with their rewards; a pair's id ends in its candidate indices, as in ``#0-3``."""
    candidates = [_with_reward(record, index, rewards[index]) for index in group]
    name = record.id if rule == "ranked" else f"{record.id}#{'-'.join(map(str, group))}"
    return record.model_copy(update={"id": name, "candidates": candidates, "meta": _meta(record, group)})


def _with_reward(record: Record, index: int, reward: Reward) -> Candidate:
    candidate = record.candidates[index]
    if candidate.labels.get("reward", reward) != reward:
        raise UserError(f"record {record.id!r}, candidate {index}: label 'reward' is already there, with another value")
    return candidate.model_copy(update={"labels": {**candidate.labels, "reward": reward}})


def _meta(record: Record, group: Sequence[int]) -> dict[str, Any]:
    """``meta`` with the scorers' details (one per candidate) reduced to the candidates of the group."""
    scores = record.meta.get("scores")
    if not isinstance(scores, dict):
        return record.meta
    k = len(record.candidates)
    picked = {
        label: [details[index] for index in group] if isinstance(details, list) and len(details) == k else details
        for label, details in scores.items()
    }
    return {**record.meta, "scores": picked}


def run(config: BuildConfig, dry_run: bool = False) -> Path:
    """Write the training records and print how many there are and how many ties were dropped.

    ``dry_run`` does all of it except writing.

    Raises:
        UserError: a record lacks what the rule needs, an option does not belong to the rule, or all rewards tie.
    """
    source, out = siblings(config.records, config.out)
    for option, rule in (("per_prompt", "all_pairs"), ("top", "ranked")):
        if getattr(config, option) is not None and config.rule != rule:
            raise UserError(f"`{option}` belongs to `rule: {rule}`, not to `rule: {config.rule}`; remove it")
    counts: Counter[str] = Counter()
    built = _build(config, source, counts)
    if dry_run:
        for _ in built:
            pass
    else:
        records.write(out, built)
    done, unit = "would write" if dry_run else "wrote", "pairs" if config.rule == "all_pairs" else "records"
    ties = f"{counts['ties']} {unit} dropped as ties"
    print(f"{done} {counts['out']} training records from {counts['in']} scored records to {out}; {ties}")
    return out


def _build(config: BuildConfig, source: Path, counts: Counter[str]) -> Iterator[Record]:
    """Stream the training records; ``counts`` collects ``in``, ``out`` and ``ties``."""
    for record in records.read(source):
        rewards = combine(record, config.reward, config.combine)
        choice = choose(rewards, config.rule, config.margin, config.per_prompt, config.top)
        counts.update({"in": 1, "out": len(choice.groups), "ties": choice.ties})
        for group in choice.groups:
            yield training_record(record, rewards, group, config.rule)
    require_complete(source, counts["in"])
    if not counts["out"]:
        raise UserError(
            f"{source}: all ties: no record has rewards more than {config.margin} apart; nothing to train on"
        )
