"""The config of an arena: many methods from one base under one budget. Imports neither torch nor diffusers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator

from diffalign.config.file import Strict
from diffalign.config.online import OnlineConfig
from diffalign.config.parts import ModelConfig, PromptsConfig, SamplingConfig, ScorerConfig

Json = Any
BASE = "base"
"""Stands for the model that every entry starts from, where an entry's name is expected."""


class Contrast(Strict):
    """Is the first better than the second, at the end?"""

    question: str
    first: str = Field(description="an entry")
    second: str = Field(default=BASE, description="another, or the base")
    label: str = "correct"
    second_label: str | None = Field(default=None, description="of the second, where it is another one")


class Target(Strict):
    """After how many network evaluations is a score reached?"""

    question: str
    of: str = Field(default=BASE, description="whose final score is to be reached")
    score: str = Field(default="correct", description="label of that score")
    label: str = Field(default="correct", description="label of the curves that are to reach it")
    reference: str | None = Field(default=None, description="entry that the others' evaluations are compared with")
    asked: list[str] = Field(default_factory=list, description="entries that the question is about")


class ArenaEntry(Strict):
    """A method and what is its own; everything else is shared."""

    title: str
    group: str = Field(default="", description="entries of a group share a chart")
    note: str = ""
    method: dict[str, Json] = Field(description="as in a training config")
    online: dict[str, Json] | None = Field(default=None, description="changes to the shared rounds; none: offline")
    build: dict[str, Json] | None = Field(default=None, description="rules that make records of the pool")
    best_only: bool = Field(default=False, description="keep the best candidate of every record alone")
    flip: float = Field(default=0.0, ge=0, lt=1, description="share of records whose best and worst are exchanged")
    lr: float = Field(default=1e-3, gt=0, description="middle of the learning rates that tuning tries")
    batch: int = Field(default=64, gt=0, description="records, samples or pairs per micro-step")


class ArenaEvaluation(Strict):
    """What a model is judged on, always from the same noise."""

    prompts: PromptsConfig
    sampling: SamplingConfig
    guided: SamplingConfig = Field(description="the last snapshot also with guidance")
    judge: ScorerConfig
    panel: list[ScorerConfig] = Field(
        min_length=1, description="other scores to follow; the first that is trained on shows over-optimisation"
    )
    seed: int = 10_000


class ArenaTuning(Strict):
    """What every method is given to find its learning rate; no held-out prompt is looked at."""

    factors: list[float] = Field(min_length=1, description="times the entry's learning rate")
    budget: int = Field(gt=0, description="network evaluations per trial")
    scale: float = Field(
        default=1.0,
        gt=0,
        description="what cells train with, of the best rate of the trials: sqrt(tuning budget / budget) keeps the "
        "variance that Adam's steps of noisy gradients add up to",
    )
    prompts: PromptsConfig = Field(description="what trials are judged on; training prompts")
    seed: int = 99


class ArenaConfig(Strict):
    """`diffalign arena`: methods x seeds -> a table, charts and a page."""

    title: str
    dir: str = Field(description="where cells are kept: a stopped arena goes on, and failed cells run again")
    out: str = Field(description="folder for results.json, the page and the charts")
    model: ModelConfig
    scorers: list[ScorerConfig] = Field(min_length=1, description="the trained rewards")
    reward: dict[str, float] = Field(description="label -> weight")
    pool: SamplingConfig = Field(description="how offline methods sample what they train on")
    pool_prompts: PromptsConfig
    pool_share: float = Field(default=0.2, gt=0, lt=1, description="of the budget that goes into sampling the pool")
    candidates: int = Field(default=6, gt=1, description="samples per prompt of the pool")
    rounds: OnlineConfig = Field(description="what online methods share")
    optim: dict[str, Json] = Field(default_factory=dict, description="optimiser of all; the learning rate is tuned")
    precision: Literal["fp32", "bf16"] = "bf16"
    budget: int = Field(gt=0, description="network evaluations per cell: forward 1, backward 2, per sample")
    moments: list[float] = Field(
        default_factory=lambda: [0.25, 0.5, 1.0],
        min_length=1,
        description="shares of the budget after which models are judged, to the nearest multiple of the first; the "
        "budget is what such multiples, of whole rounds, come nearest to",
    )
    seeds: list[int] = Field(min_length=1)
    tuning: ArenaTuning
    evaluate: ArenaEvaluation
    entries: dict[str, ArenaEntry] = Field(min_length=1)
    contrasts: list[Contrast] = Field(default_factory=list, description="questions about final scores")
    targets: list[Target] = Field(default_factory=list, description="questions about the way to a score")
    only: list[str] = Field(default_factory=list, description="entries to run now; the page shows all that have run")
    workers: int | None = Field(
        default=None, gt=0, description="cells at a time, each on a share of the cores; default: 2, with a GPU 1"
    )

    @field_validator("moments")
    @classmethod
    def _moments(cls, value: list[float]) -> list[float]:
        if not (value[0] > 0 and value[-1] == 1.0 and all(a < b for a, b in pairwise(value))):
            raise ValueError("must rise from above 0 to 1")
        stages = round(1 / value[0])
        if abs(stages * value[0] - 1) > 0.01 or len({round(share * stages) for share in value}) < len(value):
            raise ValueError("must be near to different multiples of the first, which must be one over a whole number")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("must differ")
        return value
