"""One strict pydantic model per verb: the schema of every YAML. Imports neither torch nor diffusers.

Nothing below the verbs ever sees a config object: parts take flat parameters.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from diffalign.configfile import Strict

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


class ScorerConfig(Strict):
    """One scorer and the label it writes."""

    name: str = Field(description="a scorer name, see `diffalign list scorers`, or `package.module:build`")
    label: str | None = Field(default=None, description="label to write; default: the scorer's name")
    params: dict[str, Json] = Field(default_factory=dict, description="keyword arguments of the scorer's build()")


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
        default_factory=list, description="objectives added on the same log-probs: `name`, `weight` and parameters"
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
    steps: int = Field(gt=0)
    batch: int = Field(default=1, gt=0, description="records per micro-step and process")
    accumulate: int = Field(default=1, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    shard: bool = Field(default=False, description="several processes: spread full weights over them (FSDP2)")
    save_every: int = Field(default=0, ge=0, description="steps between checkpoints; 0 = only at the end")
    keep: int = Field(default=2, gt=0, description="checkpoints to keep")
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay of a moving average; it is what gets exported"
    )
    rollback: int = Field(
        default=0,
        ge=0,
        description="after a loss that is not finite, go back to the last good checkpoint so often",
    )
    resume: str | None = Field(default=None, description="`latest` or a checkpoint folder")


class TrainConfig(Strict):
    """`diffalign train`: records -> aligned weights."""

    model: ModelConfig
    data: DataConfig
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
    candidates: int = Field(default=1, gt=0, description="samples per prompt")
    sampling: SamplingConfig = SamplingConfig()
    decoding: DecodingConfig = DecodingConfig()
    seed: int = 10_000
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
        optim: OptimConfig = OptimConfig()
        steps: int = Field(gt=0)
        batch: int = Field(gt=0)
        precision: Literal["fp32", "bf16"] = "fp32"
        save_every: int = Field(default=50, ge=0)

    title: str = "diffalign quickstart"
    dir: str = "runs/quickstart"
    seed: int = 0
    model: ModelConfig
    generate: Stage
    scorers: list[ScorerConfig] = Field(min_length=1)
    build: Rules
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
    "train": (TrainConfig, "diffalign.train.offline:run", "records -> aligned weights"),
    "export": (
        ExportConfig,
        "diffalign.export:run",
        "weights -> diffusers, PEFT, LoRA or kohya; records -> parquet",
    ),
    "eval": (EvalConfig, "diffalign.evaluate:run", "GenEval-style table, paired with a baseline"),
    "report": (ReportConfig, "diffalign.report:run", "run folders -> one HTML page"),
    "list": (None, "diffalign.doctor:list_command", "methods, objectives, shapings, families, scorers"),
    "doctor": (None, "diffalign.doctor:run", "versions, devices, disk, config and data"),
}
"""verb -> (config model, "module:function", one line of help). A test pins the set."""
