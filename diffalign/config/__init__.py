"""One strict pydantic model per verb: the schema of every YAML. Imports neither torch nor diffusers.

Nothing below the verbs ever sees a config object: parts take flat parameters.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffalign.config.arena import ArenaConfig, ArenaEntry, ArenaEvaluation, ArenaTuning
from diffalign.config.data import (
    BuildConfig,
    ExtractorConfig,
    GenerateConfig,
    ImportConfig,
    LabelConfig,
    ScoreConfig,
    ServeConfig,
    SourceConfig,
)
from diffalign.config.file import Strict
from diffalign.config.online import AnchorConfig, CreditConfig, OnlineConfig, StopConfig
from diffalign.config.parts import (
    DecodingConfig,
    LoraConfig,
    ModelConfig,
    PromptsConfig,
    SamplingConfig,
    ScorerConfig,
)

__all__ = [
    "VERBS",
    "AnchorConfig",
    "ArenaConfig",
    "ArenaEntry",
    "ArenaEvaluation",
    "ArenaTuning",
    "BuildConfig",
    "CreditConfig",
    "DataConfig",
    "DecodingConfig",
    "EvalConfig",
    "ExportConfig",
    "ExtractorConfig",
    "GenerateConfig",
    "ImportConfig",
    "LabelConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimConfig",
    "PromptsConfig",
    "QuickstartConfig",
    "ReportConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoreConfig",
    "ScorerConfig",
    "ServeConfig",
    "SourceConfig",
    "StopConfig",
    "TrainConfig",
]

Json = Any


class DataConfig(Strict):
    """What a run trains on."""

    records: str
    size: tuple[int, int] | tuple[int, int, int] | None = Field(
        default=None, description="height, width in pixels (frames before them for clips); default: the model's own"
    )
    buckets: int | None = Field(
        default=None,
        gt=0,
        description="a record keeps its aspect ratio: sides in multiples of so many pixels, area of size",
    )
    crop: Literal["centre", "random"] = Field(default="centre", description="random: one place per record")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of visits without a prompt, as in pre-training")
    flip: bool = Field(default=False, description="take a record mirrored half the time, all candidates alike")
    cache: str | None = Field(default=None, description="latent and prompt cache; default: beside the records")
    bank: int | None = Field(
        default=None, gt=0, description="repeat a record's draws after so many passes, and keep the reference's errors"
    )
    max_tokens: int | None = Field(default=None, gt=1, description="text: longest sequence; default: the model's own")


class MethodConfig(Strict):
    """A row of the catalogue and changes to it. Parameters are checked against the signatures of the parts."""

    name: str = Field(description="see `diffalign list methods`")
    draw: dict[str, Json] = Field(default_factory=dict)
    estimate: dict[str, Json] = Field(default_factory=dict)
    objective: dict[str, Json] = Field(default_factory=dict, description="`name` swaps the objective")
    shaping: list[dict[str, Json]] | None = Field(
        default=None, description="transformations of the log-probs before the objective: `name` and parameters"
    )
    extra: list[dict[str, Json]] = Field(
        default_factory=list,
        description="objectives added on the same log-probs: `name`, `weight` and parameters; one that the row has is "
        "changed, weight 0 leaves it out",
    )


class OptimConfig(Strict):
    """Optimiser and learning rate; `params` go to the torch optimiser of that name."""

    name: str = Field(default="adamw", description="a torch.optim class, any case")
    lr: float = Field(default=1e-5, gt=0)
    params: dict[str, Json] = Field(default_factory=dict)
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = "constant"
    clip: float | None = Field(default=1.0, gt=0, description="gradient norm clip; null for none")


class RunConfig(Strict):
    """The run directory and the length of training."""

    dir: str
    steps: int = Field(gt=0, description="optimiser updates in all; online: rounds times online.updates")
    batch: int = Field(
        default=1, gt=0, description="per micro-step and process: records; online samples, pairs or rankings"
    )
    accumulate: int = Field(default=1, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    shard: bool = Field(default=False, description="several processes: spread full weights over them (FSDP2)")
    save_every: int = Field(default=0, ge=0, description="steps between checkpoints; 0 = only at the end")
    keep: int = Field(default=2, gt=0, description="checkpoints to keep")
    snapshots: bool = Field(default=False, description="at every checkpoint also keep the LoRA as it would be final")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of a moving average; it is what gets exported (online it warms up)",
    )
    ema_every: int = Field(default=1, gt=0, description="steps between two moves of the average")
    rollback: int = Field(
        default=0,
        ge=0,
        description="after a loss that is not finite, go back to the last good checkpoint so often",
    )
    resume: str | None = Field(default=None, description="`latest` or a checkpoint folder")

    @model_validator(mode="after")
    def _average(self) -> RunConfig:
        if self.ema is None and self.ema_every != 1:
            raise ValueError("ema_every belongs to ema; set that too")
        return self


class TrainConfig(Strict):
    """`diffalign train`: records, or the policy's own samples -> aligned weights."""

    model: ModelConfig
    data: DataConfig | None = Field(default=None, description="records to train on; with `online` those of experts")
    online: OnlineConfig | None = Field(default=None, description="train on samples of the policy itself")
    method: MethodConfig
    optim: OptimConfig = OptimConfig()
    run: RunConfig


class ExportConfig(Strict):
    """`diffalign export`: what `train` wrote, or records -> the files that other programs read."""

    format: Literal["diffusers", "peft", "lora", "kohya", "parquet"] = Field(
        description="weights: a whole diffusers or transformers folder, a PEFT adapter, a diffusers LoRA, or kohya / "
        "ComfyUI; records: parquet files with their media inside"
    )
    model: ModelConfig | None = Field(default=None, description="weights: the model they belong to")
    weights: str | None = Field(default=None, description="a run directory, or the folder of final weights in it")
    records: str | None = Field(default=None, description="parquet: a records file")
    shard_size: int = Field(default=500, gt=0, description="parquet: megabytes per file, about")
    out: str = Field(description="new folder")


class EvalConfig(Strict):
    """`diffalign eval`: a GenEval-style table of one model, paired with a second one if given."""

    model: ModelConfig
    against: ModelConfig | None = Field(default=None, description="baseline on the same prompts and seeds")
    prompts: PromptsConfig
    judge: ScorerConfig
    panel: list[ScorerConfig] = Field(
        default_factory=list, description="more scorers to report: held-out rewards, diversity, picture statistics"
    )
    candidates: int = Field(default=1, gt=0, description="samples per prompt")
    sampling: SamplingConfig = SamplingConfig()
    decoding: DecodingConfig = DecodingConfig()
    seed: int = 10_000
    failures: float = Field(default=0.05, ge=0, le=1, description="stop when a scorer fails on more than this share")
    layout: Literal["geneval"] | None = Field(default=None, description="also write the benchmark's own files")
    snapshots: str | None = Field(
        default=None, description="a run directory: evaluate the model and every snapshot of this run instead"
    )
    trained: str | None = Field(default=None, description="snapshots: label of the reward that was trained on")
    note: str = Field(default="", description="what to say about prompts and judge in the results")
    out: str = Field(description="folder for results.json and the image records")


class ReportConfig(Strict):
    """`diffalign report`: a folder of runs and evaluations -> one self-contained HTML page."""

    dir: str = Field(description="folder whose sub-folders hold generate, score, train and eval results")
    out: str = Field(default="report.html", description="file name, relative to `dir`")
    title: str = "diffalign report"


class QuickstartConfig(Strict):
    """`diffalign quickstart`: the whole job; each stage is the config of its verb, minus model and paths."""

    class Stage(Strict):
        """Prompts and how to sample them."""

        prompts: PromptsConfig
        candidates: int = Field(default=1, gt=0)
        sampling: SamplingConfig = SamplingConfig()
        decoding: DecodingConfig = DecodingConfig()
        seed: int = 0

    class Evaluation(Stage):
        """A stage whose images are judged."""

        seed: int = 10_000
        note: str = ""

    class Rules(Strict):
        """The rules of `build`; see there."""

        reward: dict[str, float]
        combine: Literal["sum", "zscore", "wins", "ranks", "majority", "pareto"] = "sum"
        rule: Literal["best_worst", "all_pairs", "ranked"] = "all_pairs"
        margin: float = 0.0
        per_prompt: int | None = None
        top: int | None = None

    class Training(Strict):
        """Method, optimiser and length."""

        method: MethodConfig
        online: OnlineConfig | None = Field(default=None, description="instead of generate, score and build")
        optim: OptimConfig = OptimConfig()
        steps: int = Field(gt=0)
        batch: int = Field(gt=0)
        precision: Literal["fp32", "bf16"] = "fp32"
        ema: float | None = None
        save_every: int = Field(default=50, ge=0)

    title: str = "diffalign quickstart"
    dir: str = "runs/quickstart"
    seed: int = 0
    model: ModelConfig
    generate: Stage | None = None
    scorers: list[ScorerConfig] = Field(default_factory=list)
    build: Rules | None = None
    train: Training
    judge: ScorerConfig
    evaluate: dict[str, Evaluation] = Field(min_length=1, description="name -> evaluation")
    seconds: dict[str, int] = Field(default_factory=dict, description="expected seconds per stage, to show")


VERBS: dict[str, tuple[type[Strict] | None, str, str]] = {
    "quickstart": (QuickstartConfig, "diffalign.quickstart:run", "the whole job on the embedded default"),
    "import": (ImportConfig, "diffalign.importing:run", "published data sets and folders -> records"),
    "generate": (GenerateConfig, "diffalign.generate:run", "prompts x seeds -> candidates on disk"),
    "score": (ScoreConfig, "diffalign.score:run", "candidates -> candidates with labels"),
    "build": (BuildConfig, "diffalign.build:run", "scored candidates -> pairs or rankings"),
    "label": (LabelConfig, "diffalign.label:run", "candidates -> human labels, on a local page"),
    "train": (TrainConfig, "diffalign.train.start:run", "records or own samples -> aligned weights"),
    "export": (
        ExportConfig,
        "diffalign.export:run",
        "weights -> diffusers, PEFT, LoRA or kohya; records -> parquet",
    ),
    "eval": (EvalConfig, "diffalign.evaluate:run", "GenEval-style table, paired with a baseline"),
    "arena": (ArenaConfig, "diffalign.arena.run:run", "many methods, one budget -> a comparison with intervals"),
    "serve": (ServeConfig, "diffalign.serve:run", "scorers behind HTTP, for clients with `name: remote`"),
    "report": (ReportConfig, "diffalign.report:run", "run folders -> one HTML page"),
    "list": (None, "diffalign.doctor:list_command", "methods, objectives, shapings, families, scorers"),
    "doctor": (None, "diffalign.doctor:run", "versions, devices, disk, config and data"),
}
"""verb -> (config model, "module:function", one line of help). A test pins the set."""
