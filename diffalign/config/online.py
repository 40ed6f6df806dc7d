"""The config of training on the policy's own samples. Imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.config.file import Strict
from diffalign.config.parts import PromptsConfig, SamplingConfig, ScorerConfig


class AnchorConfig(Strict):
    """How weights follow the policy: ``decay = min(cap, rate * (updates - start))``; a decay of 0 copies."""

    rate: float = Field(default=0.0, ge=0, description="growth of the decay per update")
    cap: float = Field(default=0.0, ge=0, lt=1, description="largest decay")
    start: int = Field(default=0, ge=0, description="updates before the decay grows")
    every: int = Field(default=1, gt=0, description="rounds between two moves")


class CreditConfig(Strict):
    """From rewards to what the objective reads; the advantage is ``(r - mean of the group) / (std + eps)``."""

    spread: Literal["group", "all", "none"] = Field(
        default="all", description="standard deviation of a prompt's samples, of the whole round, or none"
    )
    ddof: int = Field(default=0, ge=0, le=1, description="1: sample standard deviation (DanceGRPO)")
    eps: float = Field(default=1e-4, gt=0)
    buffer: int | None = Field(
        default=None, gt=0, description="DDPO: by the last so many of a prompt, by the round's until min_count"
    )
    min_count: int = Field(default=16, gt=0, description="buffer: rewards of a prompt before its own statistics count")
    combine: Literal["sum", "normalised"] = Field(
        default="sum",
        description="several rewards: weighted sum, or each standardised in its group first (GDPO: spread all, ddof 1)",
    )
    pairs: Literal["best_worst", "all"] = Field(default="best_worst", description="methods that compare two samples")
    pareto: bool = Field(default=False, description="a pair prefers what is better in one reward and worse in none")
    threshold: float | None = Field(default=None, description="labels of single samples: desirable from here on")


class StopConfig(Strict):
    """Stop when held-out rewards fall while the trained one rises, and export the best so far; else the last."""

    prompts: PromptsConfig
    scorers: list[ScorerConfig] = Field(min_length=1, description="rewards that are not trained on")
    every: int = Field(default=10, gt=0, description="rounds between two measurements")
    sampling: SamplingConfig | None = Field(default=None, description="default: as the rollouts, without their noise")
    seed: int = 10_000


class OnlineConfig(Strict):
    """Rounds of: sample with the policy, score, turn rewards into credit, update. Counts are over all processes."""

    prompts: PromptsConfig | None = Field(default=None, description="none: those of `data`, whose samples are experts")
    groups: int = Field(gt=0, description="prompts per round")
    samples: int = Field(gt=0, description="samples per prompt, its group")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="`sampler` is for methods that keep no path")
    window: int | None = Field(
        default=None, gt=0, description="keep so many steps of the path from a random place; the others are noiseless"
    )
    window_range: tuple[int, int] | None = Field(
        default=None, description="steps that a window lies in; default: those the method learns from"
    )
    tau: float = Field(default=0.0, ge=0, description="sa_solver: how stochastic between times 0.3 and 0.9; AWM: 0.4")
    shared_noise: bool = Field(default=False, description="the samples of a prompt start from one noise")
    source: Literal["scorers", "human"] = Field(
        default="scorers", description="human: wait for `diffalign label` every round"
    )
    scorers: list[ScorerConfig] = Field(default_factory=list)
    reward: dict[str, float] = Field(default_factory=dict, description="label -> weight; default: each scorer, 1")
    failures: float = Field(default=0.05, ge=0, le=1, description="stop when more of a round cannot be scored")
    credit: CreditConfig = CreditConfig()
    refill: int = Field(default=0, ge=0, description="replace prompts whose samples are all alike, so many times")
    keep_alike: bool = Field(default=True, description="samples of such prompts count as samples without credit")
    updates: int = Field(default=1, gt=0, description="optimiser updates per round")
    passes: int = Field(default=1, gt=0, description="times that a round's samples are gone through")
    anchors: dict[Literal["reference", "behaviour", "average"], AnchorConfig] = Field(
        default_factory=dict, description="roles whose weights follow the policy"
    )
    stop: StopConfig | None = None
