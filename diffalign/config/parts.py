"""Sections that the configs of several verbs share. Imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from diffalign.config.file import Strict

Json = Any


class LoraConfig(Strict):
    """A low-rank adapter on the trained network."""

    rank: int = Field(default=16, gt=0, description="rank of the update")
    alpha: int | None = Field(default=None, gt=0, description="scale numerator; default: the rank (scale 1)")
    targets: list[str] | None = Field(default=None, description="module name endings; default: the family's own list")
    start: str | None = Field(
        default=None,
        description="train on from the LoRA in this folder, with its rank and targets; it is the reference",
    )


class ModelConfig(Strict):
    """Which network, from where, in which form."""

    family: str = Field(description="a family name, see `diffalign list families`")
    path: str = Field(
        description="a diffusers or transformers folder, a Hub id, `embedded:shapes` or `embedded:puzzles`"
    )
    adapter: str | None = Field(default=None, description="LoRA folder to load on top (generation and evaluation)")
    lora: LoraConfig | None = Field(default=None, description="train a LoRA; without it the full network trains")
    others: dict[str, str] = Field(
        default_factory=dict, description="training: role -> folder of a frozen model, or of an adapter of this one"
    )
    parts: dict[str, str] = Field(
        default_factory=dict, description="component of the pipeline -> a folder or Hub id to take it from instead"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 ...")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of what does not train; a VAE and what trains stay in float32"
    )
    quant: Literal["nf4", "int8"] | None = Field(
        default=None, description="weights of the frozen network under a LoRA in 4 or 8 bits (bitsandbytes)"
    )
    attention: str | None = Field(
        default=None, description="xformers, flash, sage ... as diffusers names them; default: torch's own"
    )
    compile: bool = Field(default=False, description="training: torch.compile the repeated blocks")
    checkpointing: bool = Field(default=False, description="training: less memory, a third more time")


class SamplingConfig(Strict):
    """How images are sampled."""

    sampler: str = "euler"
    steps: int = Field(default=20, gt=0)
    guidance: float = Field(default=1.0, ge=0, description="1 = no classifier-free guidance")
    size: tuple[int, int] | tuple[int, int, int] | None = Field(
        default=None, description="height, width in pixels (frames before them for clips); default: the model's own"
    )
    batch: int = Field(default=64, gt=0, description="samples per forward")


class DecodingConfig(Strict):
    """How text is sampled."""

    temperature: float = Field(default=1.0, ge=0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus: the smallest set of tokens of this mass")
    max_tokens: int = Field(default=256, gt=0, description="longest completion")
    batch: int = Field(default=64, gt=0, description="completions per forward")


class PromptsConfig(Strict):
    """Where prompts come from."""

    source: str = Field(description="`shapes:train`, `puzzles:heldout`, a .txt (a prompt per line) or a .jsonl file")
    per_task: int | None = Field(default=None, gt=0, description="so many prompts of every task, cycling if needed")
    limit: int | None = Field(default=None, gt=0, description="at most this many prompts")


class ScorerConfig(Strict):
    """One scorer and the label it writes."""

    name: str = Field(description="a scorer name, see `diffalign list scorers`, or `package.module:build`")
    label: str | None = Field(default=None, description="label to write; default: the scorer's name")
    params: dict[str, Json] = Field(default_factory=dict, description="keyword arguments of the scorer's build()")

    @property
    def key(self) -> str:
        """The label that it writes."""
        return self.label or self.name
