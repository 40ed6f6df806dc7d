"""What an arena refuses before anything runs, because a cell or the report would refuse it after hours."""

from __future__ import annotations

from collections.abc import Iterable

from diffalign import build, score
from diffalign import config as cfg
from diffalign.arena.plan import Plan
from diffalign.config.arena import BASE
from diffalign.errors import UserError, nearest
from diffalign.methods import resolve
from diffalign.train import job


def check(config: cfg.ArenaConfig, plans: Iterable[Plan]) -> None:
    """Refuse before anything runs what a cell or the report would refuse after hours.

    Args:
        plans: one of every entry.
    """
    if config.model.lora is None:
        raise UserError("model.lora: an arena compares LoRAs; give its rank")
    for name in config.only:
        _known("only", name, config.entries)
    for plan in plans:
        _check_entry(plan)
    trained = score.by_label(config.scorers)
    labels = score.by_label([config.evaluate.judge, *config.evaluate.panel])
    if "guided" in labels:
        raise UserError("evaluate.panel: the label `guided` is that of the judge with guidance; choose another")
    for name in config.reward:
        _known("reward", name, trained)
    if not any(weight(config, one) for one in config.evaluate.panel):
        raise UserError(f"evaluate.panel: follow one of the rewards that are trained on: {', '.join(trained)}")
    entries, scores = {BASE, *config.entries}, {*labels, "guided"}
    for index, contrast in enumerate(config.contrasts):
        _known(f"contrasts.{index}", contrast.first, entries)
        _known(f"contrasts.{index}", contrast.second, entries)
        _known(f"contrasts.{index}", contrast.label, scores)
        _known(f"contrasts.{index}", contrast.second_label or contrast.label, scores)
    for index, target in enumerate(config.targets):
        for name in (target.of, target.reference or BASE, *target.asked):
            _known(f"targets.{index}", name, entries)
        for name in (target.score, target.label):
            _known(f"targets.{index}", name, scores)


def _known(where: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise UserError(f"{where}: there is no {name!r}{nearest(name, names)}")


def _check_entry(plan: Plan) -> None:
    """An entry is a method, records or rounds for it, and settings that are those of the verbs."""
    where = f"entries.{plan.name}"
    if plan.name == BASE:
        raise UserError(f"{where}: is the name of the model that all start from; choose another")
    if plan.entry.online is None and plan.entry.build is None:
        raise UserError(f"{where}: give `build` rules, `online` settings, or both")
    try:
        training = plan.training(1)
        if training.online is None:
            resolve(**training.method.model_dump())
        else:
            job.check(training)
            if training.online.stop is not None:
                raise UserError("online.stop: would end before the budget; remove it")
        if plan.entry.build is not None:
            build.check(plan.building())
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def weight(config: cfg.ArenaConfig, spec: cfg.ScorerConfig) -> float:
    """What a scorer counts in the reward that is trained on, under whatever label."""
    alike = [one.key for one in config.scorers if (one.name, one.params) == (spec.name, spec.params)]
    return sum(config.reward.get(key, 0.0) for key in alike)
