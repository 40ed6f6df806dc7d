"""`diffalign build`: scored candidates -> training records with ``labels["reward"]``, and a page of statistics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from diffalign import choices, pool_page, records, rewards
from diffalign.choices import Choice
from diffalign.config import BuildConfig
from diffalign.errors import UserError
from diffalign.files import require_complete, siblings
from diffalign.records import Candidate, Record
from diffalign.rewards import Reward, level

OPTIONS = {
    "per_prompt": ("all_pairs",),
    "top": ("ranked",),
    "threshold": ("unpaired",),
    "stages": ("curriculum",),
    "decided": ("segments",),
    "constraints": ("best_worst", "all_pairs"),
    "soft": ("best_worst", "all_pairs"),
}
"""Option -> the rules it belongs to."""
UNITS = {"best_worst": "records", "ranked": "records", "unpaired": "candidates"}
"""What a rule counts ties in; the others count pairs."""
DECIDED = 0.2  # of DenseDPO
DROPPED = {
    "vetoed": "pairs dropped by constraints",
    "failed": "candidates left out because a scorer failed on them",
    "short": "records dropped because too few candidates are left",
}


def run(config: BuildConfig, dry_run: bool = False) -> Path:
    """Write the training records and a page about them; print how many there are and what was dropped.

    ``dry_run`` does all of it except writing.

    Returns:
        The output file, or the first of a curriculum's.

    Raises:
        UserError: a record lacks what the rule needs, an option does not belong to the rule, or all rewards tie.
    """
    source, out = siblings(config.records, config.out)
    check(config)
    builder = Builder(config, source)
    outputs = stage_files(out, config.stages or 1)
    if dry_run:
        for _ in builder.records():
            pass
    else:
        _write(builder, outputs)
        if config.page:
            page = pool_page.write(source, outputs[0], tuple(config.reward))
            print(f"statistics: {page}")
    _print_counts(config, builder.counts, outputs, "would write" if dry_run else "wrote")
    return outputs[0]


def _print_counts(config: BuildConfig, counts: Counter[str], outputs: Sequence[Path], done: str) -> None:
    unit, fate = UNITS.get(config.rule, "pairs"), "kept" if config.ties == "keep" else "dropped"
    dropped = "".join(f"; {counts[key]} {text}" for key, text in DROPPED.items() if counts[key])
    print(
        f"{done} {counts['out']} training records from {counts['in']} scored records to "
        f"{', '.join(map(str, outputs))}; {counts['ties']} {unit} {fate} as ties{dropped}"
    )


def stage_files(out: Path, stages: int) -> list[Path]:
    """The output, or one file per stage of a curriculum."""
    return [out] if stages == 1 else [out.with_name(f"{out.stem}-{n}{out.suffix}") for n in range(1, stages + 1)]


def _write(builder: Builder, outputs: Sequence[Path]) -> None:
    if len(outputs) == 1:
        records.write(outputs[0], (record for _, record in builder.records()))
        return
    with ExitStack() as stack:
        puts = [stack.enter_context(records.writer(path)) for path in outputs]
        for stage, record in builder.records():
            puts[stage](record)


def check(config: BuildConfig) -> None:
    """Refuse rules that do not go together.

    Raises:
        UserError: which.
    """
    for option, rules in OPTIONS.items():
        value = getattr(config, option)
        if value not in (None, {}) and config.rule not in rules:
            names = " or ".join(f"`rule: {rule}`" for rule in rules)
            raise UserError(f"`{option}` belongs to {names}, not to `rule: {config.rule}`; remove it")
    needed = {"unpaired": "threshold", "curriculum": "stages"}.get(config.rule)
    if needed and getattr(config, needed) is None:
        raise UserError(f"`rule: {config.rule}` needs `{needed}`")
    if (not config.reward) != (config.rule == "conditions"):
        raise UserError(
            "`reward` says which labels count; give it, unless the rule is conditions, whose pairs need no reward"
        )
    if config.ties == "keep" and config.rule not in ("best_worst", "all_pairs", "ranked"):
        raise UserError(f"`ties: keep` is for pairs and rankings; `rule: {config.rule}` has nothing to keep")


class Made(NamedTuple):
    """A training record and the stage of a curriculum it belongs to."""

    stage: int
    record: Record


class Builder:
    """Turns records into training records and counts what becomes of them."""

    def __init__(self, config: BuildConfig, source: Path) -> None:
        self.config, self.source = config, source
        self.counts: Counter[str] = Counter()
        self._needed = {*config.reward, *config.constraints}
        ranges = config.combine == "zscore" or config.soft == "range"
        self._pool = rewards.pool_spread(records.read(source), config.reward) if ranges else None
        self._least = 1 if config.rule in ("unpaired", "conditions") else 2
        self._decided = DECIDED if config.decided is None else config.decided
        self._scale = self._soft_scale()

    def _soft_scale(self) -> float | None:
        """What a reward difference is divided by before the sigmoid; for ``range`` that of the pool's rewards."""
        if self.config.soft != "range":
            return self.config.soft
        low, high = math.inf, -math.inf
        for record in records.read(self.source):
            kept = self._usable(record)
            if len(kept.candidates) >= self._least:
                levels = [level(reward) for reward in self._combined(kept)]
                low, high = min(low, *levels), max(high, *levels)
        if not low < high:
            raise UserError(f"{self.source}: all ties: `soft: range` needs rewards that differ")
        return high - low

    def records(self) -> Iterator[Made]:
        """Stream the training records.

        Raises:
            UserError: see :func:`run`.
        """
        for record in records.read(self.source):
            self.counts["in"] += 1
            usable = self._usable(record)
            self.counts["failed"] += len(record.candidates) - len(usable.candidates)
            if len(usable.candidates) < self._least:
                if len(record.candidates) < self._least:
                    n = len(record.candidates)
                    raise UserError(f"record {record.id!r} has {n} candidates; rewards compare at least two")
                self.counts["short"] += 1
                continue
            for made in self._made(usable):
                self.counts["out"] += 1
                yield made
        require_complete(self.source, self.counts["in"])
        if not self.counts["out"]:
            raise UserError(
                f"{self.source}: all ties: no record has rewards more than {self.config.margin} apart; "
                "nothing to train on"
            )

    def _usable(self, record: Record) -> Record:
        """The record without the candidates that a needed scorer failed on."""
        kept = [i for i, c in enumerate(record.candidates) if not (self._needed & c.errors.keys() - c.labels.keys())]
        if len(kept) == len(record.candidates):
            return record
        return record.model_copy(
            update={"candidates": [record.candidates[i] for i in kept], "meta": _meta(record, kept)}
        )

    def _combined(self, record: Record) -> list[Reward]:
        return rewards.combine(record, self.config.reward, self.config.combine, self._pool)

    def _made(self, record: Record) -> Iterator[Made]:
        config = self.config
        if config.rule == "conditions":
            yield from (Made(0, pair) for pair in condition_pairs(record))
            return
        values = self._combined(record)
        if "reward" in config.reward:  # what the rule makes of it takes its place
            record = _without_reward(record)
        if config.rule == "curriculum":
            assert config.stages is not None
            for stage, pair in enumerate(choices.curriculum(values, config.stages)):
                if pair is not None:
                    yield Made(stage, training_record(record, values, pair))
            return
        choice = self._choice(record, values)
        self.counts["ties"] += len(choice.tied)
        self.counts["vetoed"] += choice.vetoed
        for group in choice.groups:
            yield Made(0, self._finished(record, values, group))
        for group in choice.tied if config.ties == "keep" else ():
            mean = sum(level(values[i]) for i in group) / len(group)
            yield Made(0, training_record(record, dict.fromkeys(group, mean), group, whole=config.rule == "ranked"))

    def _choice(self, record: Record, values: Sequence[Reward]) -> Choice:
        config = self.config
        limits = dict(config.constraints)
        if config.combine == "pareto":  # a front is no order: the better one may lose on no label at all
            limits = {**dict.fromkeys(config.reward, 0.0), **limits}
        veto = rewards.vetoes(record, config.reward, limits) if limits else frozenset()
        rules: dict[str, Callable[[], Choice]] = {
            "best_worst": lambda: choices.best_worst(values, config.margin, veto),
            "all_pairs": lambda: choices.all_pairs(values, config.margin, config.per_prompt, veto),
            "ranked": lambda: choices.ranked(values, config.margin, config.top),
            "unpaired": lambda: choices.unpaired(values, config.margin, config.threshold or 0.0),
            "segments": lambda: choices.segments(_per_segment(values), config.margin, self._decided),
        }
        return rules[config.rule]()

    def _finished(self, record: Record, values: Sequence[Reward], group: Sequence[int]) -> Record:
        """The training record of a group, its rewards in the form that the rule gives them."""
        config, own = self.config, {i: values[i] for i in group}
        if config.rule == "unpaired":
            made = training_record(record, own, group)
            liked = float(level(values[group[0]]) > (config.threshold or 0.0))
            return _labelled(made, "desirable", [liked])
        if config.rule == "segments":
            first, second = (values[i] for i in group)
            assert isinstance(first, list)
            assert isinstance(second, list)
            verdicts = choices.segment_verdicts(first, second, config.margin)
            return training_record(record, dict(zip(group, verdicts, strict=True)), group)
        if self._scale is not None:
            better, worse = (level(values[i]) for i in group)
            p = 1 / (1 + math.exp(-(better - worse) / self._scale))
            own = dict(zip(group, (p, 1 - p), strict=True))
        return training_record(record, own, group, whole=config.rule == "ranked")


def _per_segment(values: Sequence[Reward]) -> list[list[float]]:
    """The rewards per segment; a single number is a clip of one."""
    return [value if isinstance(value, list) else [value] for value in values]


def condition_pairs(record: Record) -> Iterator[Record]:
    """The record's own picture under its condition, against under what each sample shows (CPO, arXiv:2511.04753).

    Raises:
        UserError: there is no own picture, no condition, or none was extracted.
    """
    if record.source is None or record.condition is None:
        raise UserError(f"record {record.id!r}: pairs of conditions need its `source` picture and its `condition`")
    for k, candidate in enumerate(record.candidates):
        shown = candidate.origin.get("condition")
        if not isinstance(shown, str):
            raise UserError(
                f"record {record.id!r}, candidate {k}: what it shows was not extracted; generate with `extract`"
            )
        pair = [
            Candidate(sample=record.source, condition=name, labels={"reward": reward}, origin=origin)
            for name, reward, origin in ((record.condition, 1.0, {}), (shown, 0.0, candidate.origin))
        ]
        yield record.model_copy(update={"id": f"{record.id}#{k}", "condition": None, "candidates": pair})


def training_record(
    record: Record, values: Mapping[int, Reward] | Sequence[Reward], group: Sequence[int], *, whole: bool = False
) -> Record:
    """The candidates of a group with their rewards; the id ends in their indices, as in ``#0-3``, unless ``whole``."""
    candidates = [_with_reward(record, index, values[index]) for index in group]
    name = record.id if whole else f"{record.id}#{'-'.join(map(str, group))}"
    return record.model_copy(update={"id": name, "candidates": candidates, "meta": _meta(record, group)})


def _without_reward(record: Record) -> Record:
    candidates = [
        candidate.model_copy(update={"labels": {k: v for k, v in candidate.labels.items() if k != "reward"}})
        for candidate in record.candidates
    ]
    return record.model_copy(update={"candidates": candidates})


def _labelled(record: Record, label: str, values: Sequence[float]) -> Record:
    candidates = [
        candidate.model_copy(update={"labels": {**candidate.labels, label: value}})
        for candidate, value in zip(record.candidates, values, strict=True)
    ]
    return record.model_copy(update={"candidates": candidates})


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
