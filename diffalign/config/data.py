"""The configs of the verbs that make data. Imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from diffalign.config.file import Strict
from diffalign.config.parts import DecodingConfig, ModelConfig, PromptsConfig, SamplingConfig, ScorerConfig

Json = Any


class ImportConfig(Strict):
    """`diffalign import`: a published data set, or a folder of pictures -> records."""

    format: Literal[
        "pickapic",
        "hpdv2",
        "hpdv3",
        "imagereward",
        "videofeedback",
        "videoalign",
        "ultrafeedback",
        "trl",
        "d3po",
        "folders",
        "jsonl",
        "geneval",
        "dpg",
        "compbench",
        "prompts",
        "parquet",
    ] = Field(description="the layout of the source; parquet is what `diffalign export` writes")
    source: str = Field(description="a file of the data set, or its folder")
    out: str = Field(description="folder for records.jsonl and media/")
    root: str | None = Field(
        default=None, description="folder that the paths in the data set are relative to; default: that of the source"
    )
    split: str | None = Field(default=None, description="which of the source's splits; needed where it has several")
    limit: int | None = Field(default=None, gt=0, description="the first so many rows")
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="at a broken row; skipped ones are listed in records.jsonl.skipped.jsonl"
    )
    link: bool = Field(default=False, description="hard links to local media instead of copies")


class SourceConfig(Strict):
    """One of several makers of candidates: what it does not say is as at the top."""

    model: ModelConfig | None = None
    candidates: int | None = Field(default=None, gt=0)
    sampling: SamplingConfig | None = Field(default=None, description="keys to change")
    decoding: DecodingConfig | None = Field(default=None, description="keys to change")
    seed: int | None = Field(default=None, description="with the seed of another source, both start from one noise")


class ExtractorConfig(Strict):
    """What reads a condition off a picture."""

    name: str = Field(description="canny, depth ..., see `diffalign list extractors`")
    params: dict[str, Json] = Field(default_factory=dict)


class GenerateConfig(Strict):
    """`diffalign generate`: prompts x seeds -> records; images follow ``sampling``, texts ``decoding``."""

    model: ModelConfig
    prompts: PromptsConfig
    candidates: int = Field(default=4, gt=0, description="samples per prompt")
    sampling: SamplingConfig = SamplingConfig()
    decoding: DecodingConfig = DecodingConfig()
    seed: int = 0
    sources: dict[str, SourceConfig] = Field(
        default_factory=dict, description="name -> model, sampler, guidance ... that makes candidates of every prompt"
    )
    strength: tuple[float, float] | None = Field(
        default=None,
        description="start from each record's `source`, noised to one level drawn from this range (DenseDPO's pairs)",
    )
    extract: ExtractorConfig | None = Field(
        default=None, description="read the condition that each sample shows (pairs of conditions, see `build`)"
    )
    engine: Literal["local", "ray"] = Field(default="local", description="ray: workers on this machine or a cluster")
    workers: int = Field(default=1, gt=0, description="ray: how many hold the model")
    out: str = Field(description="folder for records.jsonl and media/")


class ScoreConfig(Strict):
    """`diffalign score`: records -> records with labels."""

    records: str
    out: str = Field(description="output .jsonl, in the folder of the input (media paths are relative to it)")
    scorers: list[ScorerConfig] = Field(min_length=1)
    batch: int = Field(default=256, gt=0)
    failures: float = Field(
        default=0.05, ge=0, le=1, description="stop when a scorer fails on more than this share of the candidates"
    )
    retry: bool = Field(default=False, description="the input was scored before: score what failed, keep the rest")
    engine: Literal["local", "ray"] = Field(default="local", description="ray: workers on this machine or a cluster")
    workers: int = Field(default=1, gt=0, description="ray: how many hold the scorers")


class BuildConfig(Strict):
    """`diffalign build`: scored candidates -> training records with `labels.reward`."""

    records: str
    out: str = Field(description="output .jsonl, in the folder of the input")
    reward: dict[str, float] = Field(default_factory=dict, description="label -> weight; below 0: lower is better")
    combine: Literal["sum", "zscore", "wins", "ranks", "majority", "pareto"] = Field(
        default="sum",
        description="weighted sum, of raw or pool-standardised labels; win counting (RankDPO), mean rank, majority "
        "vote of the labels; Pareto: better on no label's cost",
    )
    rule: Literal["best_worst", "all_pairs", "ranked", "unpaired", "segments", "curriculum", "conditions"] = Field(
        default="best_worst",
        description="pairs, rankings, single candidates (KTO), pairs per segment of a clip (DenseDPO), pairs from "
        "easy to hard (Curry-DPO), pairs of conditions (CPO)",
    )
    margin: float = Field(default=0.0, ge=0, description="reward differences up to this are ties")
    ties: Literal["drop", "keep"] = Field(default="drop", description="keep: with equal rewards")
    constraints: dict[str, float] = Field(
        default_factory=dict, description="label -> how much the preferred one may lose on it; worse pairs are dropped"
    )
    soft: float | Literal["range"] | None = Field(
        default=None,
        description="rewards become probabilities, sigmoid(difference / this); range: that of the pool (SmPO, with "
        "objective.kind: probability)",
    )
    per_prompt: int | None = Field(default=None, gt=0, description="all_pairs: keep the widest so many per prompt")
    top: int | None = Field(default=None, gt=1, description="ranked: keep the best so many candidates")
    threshold: float | None = Field(default=None, description="unpaired: above it is desirable, below it is not")
    decided: float | None = Field(
        default=None, ge=0, lt=1, description="segments: keep pairs with more than this share decided; default .2"
    )
    stages: int | None = Field(default=None, gt=1, description="curriculum: how many files, OUT-1.jsonl ...")
    page: bool = Field(default=True, description="write a page of statistics beside the output")


class LabelConfig(Strict):
    """`diffalign label`: a page on which people compare candidates; `merge` makes labels of their answers."""

    records: str
    out: str = Field(description="answers, a .jsonl that is only appended to")
    task: Literal["pair", "best", "rank", "segments"] = Field(
        description="two candidates, the best of all, all in order (ties allowed), or two clips segment by segment"
    )
    pairs: int = Field(default=3, gt=0, description="pair, segments: so many pairs of a record with more candidates")
    limit: int | None = Field(default=None, gt=0, description="only the first so many records")
    annotators: list[str] = Field(default_factory=list, description="who may answer; default: who types a name")
    overlap: int | None = Field(default=None, gt=0, description="annotators per item; default: everybody sees all")
    seed: int = Field(default=0, description="of pairs, and of everybody's order and sides")
    segment_seconds: float = Field(default=1.0, gt=0, description="segments: how long one is")
    host: str = Field(default="127.0.0.1", description="address to serve on; one that others reach needs a `token`")
    port: int = Field(default=8410, ge=0, lt=65536, description="0: any free one")
    token: str | None = Field(default=None, min_length=12, description="asked of every visitor, as part of the URL")
    label: str = Field(default="human", min_length=1, description="merge: label to write")
    merge: str | None = Field(
        default=None, description="write the records with labels into this .jsonl beside them, and serve nothing"
    )


class ServeConfig(Strict):
    """`diffalign serve`: scorers behind HTTP."""

    scorers: list[ScorerConfig] = Field(min_length=1, description="a list, or names with commas between them")
    host: str = Field(default="127.0.0.1", description="address to listen on; any but a loopback one needs a token")
    port: int = Field(default=8765, ge=0, le=65535, description="0: a free one, which is printed")
    token_env: str | None = Field(default=None, description="environment variable that holds the token of the clients")
    journal: str | None = Field(
        default=None, description="file of all outcomes: with it a killed server forgets none of them"
    )
    retention: float = Field(default=86400, gt=0, description="seconds that an outcome is kept for who asks again")
    max_batch: int = Field(default=64, gt=0, description="items per scorer call, of all clients")
    max_wait_ms: float = Field(default=20, ge=0, description="how long an item waits for others to join its call")
    max_queued: int = Field(default=4096, gt=0, description="items that may wait; more are answered 429")
    max_queued_mb: int = Field(default=1024, gt=0, description="megabytes of requests that are held; as above")
    max_items: int = Field(default=1024, gt=0, description="items per request")
    max_body_mb: int = Field(default=256, gt=0, description="megabytes per request")
    max_pixels: int = Field(default=64_000_000, gt=0, le=64_000_000, description="pixels per picture")
    timeout: float = Field(default=300, gt=0, description="seconds after which an item is answered as `timeout`")
    upload_timeout: float = Field(default=60, gt=0, description="seconds that a request may take to arrive")

    @field_validator("scorers", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return [{"name": name.strip()} for name in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> ServeConfig:
        if self.max_items > self.max_queued or self.max_body_mb > self.max_queued_mb:
            raise ValueError("a request of max_items and max_body_mb must fit into max_queued and max_queued_mb")
        return self
