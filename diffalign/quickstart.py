"""`diffalign quickstart`: generate -> score -> build -> train -> eval -> report, each stage the verb of that name."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from diffalign import build, evaluate, generate, report, score
from diffalign import config as cfg
from diffalign.config.file import Strict, dump
from diffalign.errors import UserError
from diffalign.files import replacing, write_json
from diffalign.machine import hardware, versions
from diffalign.train import start

ADAPTER = "train/lora"


def stage_configs(config: cfg.QuickstartConfig) -> dict[str, tuple[Callable[..., Path], Strict]]:
    """The verbs to run, in order, each with the config a user could have written for it."""
    root = Path(config.dir)
    base = config.model.model_copy(update={"lora": None})
    aligned = base.model_copy(update={"adapter": str(root / ADAPTER)})
    stages = {} if config.train.online else _pool_stages(config, root / "pool", base)
    stages["train"] = (start.run, _training(config, root))
    for name, stage in config.evaluate.items():
        settings = cfg.EvalConfig(
            model=aligned, against=base, judge=config.judge, out=str(root / "eval" / name), **_seeded(stage, 0)
        )
        stages[f"eval {name}"] = (evaluate.run, settings)
    stages["report"] = (report.run, cfg.ReportConfig(dir=str(root), title=config.title))
    return stages


def _pool_stages(
    config: cfg.QuickstartConfig, pool: Path, base: cfg.ModelConfig
) -> dict[str, tuple[Callable[..., Path], Strict]]:
    """What makes the records that offline training reads."""
    if config.generate is None or config.build is None or not config.scorers:
        raise UserError("quickstart: give generate, scorers and build, or train.online in their place")
    made, scored, records = (str(pool / name) for name in ("records.jsonl", "scored.jsonl", "train.jsonl"))
    generating = cfg.GenerateConfig(model=base, out=str(pool), **_seeded(config.generate, config.seed))
    building = cfg.BuildConfig(records=scored, out=records, **config.build.model_dump())
    return {
        "generate": (generate.run, generating),
        "score": (score.run, cfg.ScoreConfig(records=made, out=scored, scorers=config.scorers)),
        "build": (build.run, building),
    }


def _training(config: cfg.QuickstartConfig, root: Path) -> cfg.TrainConfig:
    train = config.train
    return cfg.TrainConfig(
        model=config.model,
        data=None if train.online else cfg.DataConfig(records=str(root / "pool" / "train.jsonl")),
        online=train.online,
        method=train.method,
        optim=train.optim,
        run=cfg.RunConfig(
            dir=str(root / "train"),
            steps=train.steps,
            batch=train.batch,
            precision=train.precision,
            seed=config.seed,
            ema=train.ema,
            save_every=train.save_every,
            resume="latest",
        ),
    )


def _seeded(stage: cfg.QuickstartConfig.Stage, offset: int) -> dict[str, Any]:
    """A stage's settings; the job's seed moves the training pool, never the evaluation."""
    return {**{name: getattr(stage, name) for name in type(stage).model_fields}, "seed": stage.seed + offset}


def run(config: cfg.QuickstartConfig, dry_run: bool = False) -> Path:
    """Run the whole job; stages that are finished are kept, so a stopped job continues. Returns the report."""
    root = Path(config.dir)
    stages = stage_configs(config)
    if dry_run:
        for name, (_, settings) in stages.items():
            print(f"# {name}\n{dump(settings)}")
        return root
    text = dump(config)
    known = root / "config.yaml"
    if known.is_file() and known.read_text(encoding="utf-8") != text:
        raise UserError(f"dir: {root} belongs to a job with other settings; choose another dir or delete it")
    if not known.is_file() and root.exists() and any(root.iterdir()):
        raise UserError(f"dir: {root} is not empty; choose another dir or delete it")
    with replacing(known) as handle:
        handle.write(text.encode())
    console, done, started = Console(), [], time.perf_counter()
    result = root
    for index, (name, (verb, settings)) in enumerate(stages.items(), 1):
        console.rule(f"{index}/{len(stages)} {name}{_hint(config, name)}", align="left")
        if name == "report":
            _write_job(root, config, done, started)
        begun = time.perf_counter()
        result = verb(settings)
        done.append({"name": name, "seconds": round(time.perf_counter() - begun, 1)})
    console.print(f"\nfinished in {time.perf_counter() - started:.0f} s: open {result.resolve()}")
    return result


def _hint(config: cfg.QuickstartConfig, stage: str) -> str:
    expected = config.seconds.get(stage)
    return f" (about {expected} s on two CPU cores)" if expected else ""


def _write_job(root: Path, config: cfg.QuickstartConfig, stages: list[dict[str, Any]], started: float) -> None:
    write_json(
        root / "job.json",
        {
            "title": config.title,
            "command": " ".join(["diffalign", *sys.argv[1:]]),
            "seconds": round(time.perf_counter() - started, 1),
            "stages": stages,
            "versions": versions(),
            "machine": hardware(),
        },
    )
