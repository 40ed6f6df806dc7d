"""Builds the folder that `diffalign report` reads, part by part, with invented numbers."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from diffalign import records
from diffalign.records import Candidate, Record

TASKS = ("single_object", "two_object", "counting")
PROMPTS = ("a photo of a circle", "a photo of a ring and a cross", "a photo of three red squares")


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def picture(path: Path, seed: int, side: int = 32) -> None:
    """A disc of a random colour on grey."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    inside = np.hypot(x - rng.uniform(0.3, 0.7), y - rng.uniform(0.3, 0.7)) < rng.uniform(0.12, 0.3)
    image = np.full((side, side, 3), 205, np.uint8)
    image[inside] = rng.integers(0, 255, 3)
    records.save_image(path, image)


def candidate(folder: Path, name: str, seed: int, side: int = 32, **labels: float) -> Candidate:
    """A candidate with its image on disk."""
    picture(folder / "media" / f"{name}.png", seed, side)
    return Candidate(sample=f"media/{name}.png", labels=labels, origin={"seed": seed})


def measured(before: float, after: float, half: float = 0.04) -> dict[str, Any]:
    """A paired measurement whose intervals all have the same half width."""
    change = after - before
    return {
        "policy": after,
        "interval": [after - half, after + half],
        "against": before,
        "against_interval": [before - half, before + half],
        "difference": change,
        "difference_interval": [change - half, change + half],
    }


def results(before: float = 0.40, after: float = 0.51, half: float = 0.03, **changes: Any) -> dict[str, Any]:
    """The content of a ``results.json`` with a baseline."""
    tasks = {
        task: {"n": 128, **measured(before - 0.1 + 0.1 * i, after - 0.05 + 0.05 * i, 0.07)}
        for i, task in enumerate(TASKS)
    }
    return {
        "schema": 1,
        "name": "unguided",
        "judge": "shapes (correct)",
        "metric": "correct",
        "note": "held-out prompts; single_object has no held-out prompts",
        "sampling": {"sampler": "euler", "steps": 20, "guidance": 1.0, "size": None},
        "seed": 10_000,
        "n": 384,
        "prompts": 187,
        "overall": measured(before, after, half),
        "tasks": tasks,
        **changes,
    }


def unpaired(content: dict[str, Any]) -> dict[str, Any]:
    """The same results without their baseline."""

    def alone(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if not key.startswith(("against", "difference"))}

    tasks = {task: alone(row) for task, row in content["tasks"].items()}
    return {**content, "overall": alone(content["overall"]), "tasks": tasks}


def add_evaluation(root: Path, content: dict[str, Any] | None = None, per_task: int = 8, side: int = 32) -> Path:
    """``eval/NAME`` with ``per_task`` prompts of every task, judged at random."""
    content = content or results()
    folder = root / "eval" / content["name"]
    write_json(folder / "results.json", content)
    roles = ("policy", "against") if "against" in content["overall"] else ("policy",)
    for role in roles:
        rng = random.Random(role)
        rows = []
        for task, prompt in zip(TASKS, PROMPTS, strict=True):
            for index in range(per_task):
                name = f"{task}-{index}"
                label = float(rng.random() < content["overall"][role])
                sample = candidate(folder / role, name, index, side, correct=label)
                rows.append(Record(id=name, prompt=f"{prompt} {index}", candidates=[sample], meta={"tag": task}))
        records.write(folder / role / "scored.jsonl", rows)
    return folder


def add_pool(root: Path, prompts: int = 24, k: int = 4) -> Path:
    """``pool/``: graded candidates, and one pair of best and worst per prompt that does not tie."""
    folder = root / "pool"
    rng = random.Random(0)
    scored, train = [], []
    for index in range(prompts):
        task = index % len(TASKS)
        name = f"{index:03d}"
        samples = [
            candidate(folder, f"{name}-{i}", index * k + i, graded=rng.choice((0.0, 0.25, 0.5, 0.75, 1.0)))
            for i in range(k)
        ]
        record = Record(id=name, prompt=PROMPTS[task], candidates=samples, meta={"tag": TASKS[task]})
        scored.append(record)
        ordered = sorted(samples, key=lambda c: c.labels["graded"])
        if ordered[0].labels != ordered[-1].labels:
            pair = [c.model_copy(update={"labels": {"reward": c.labels["graded"]}}) for c in (ordered[-1], ordered[0])]
            train.append(record.model_copy(update={"candidates": pair}))
    bare = [
        r.model_copy(update={"candidates": [c.model_copy(update={"labels": {}}) for c in r.candidates]}) for r in scored
    ]
    records.write(folder / "records.jsonl", bare)
    records.write(folder / "scored.jsonl", scored)
    records.write(folder / "train.jsonl", train)
    return folder


def metrics(step: int, steps: int, rng: random.Random) -> dict[str, float]:
    """A plausible line of ``metrics.jsonl``; step 0 has policy = reference."""
    done = step / steps
    return {
        "step": step,
        "seconds": 0.2 * step,
        "loss": math.log(2) - (0.25 * done + rng.gauss(0, 0.05)) * bool(step),
        "reward/accuracy": 0.5 if not step else min(1.0, 0.55 + 0.3 * done + rng.gauss(0, 0.06)),
        "drift/chosen": (-2e-4 * done + rng.gauss(0, 5e-5)) * bool(step),
        "drift/rejected": (6e-4 * done + rng.gauss(0, 8e-5)) * bool(step),
        "grad_norm": 1.0 + abs(rng.gauss(0, 0.3)),
        "lr": 1e-4,
    }


def add_training(root: Path, steps: int = 300) -> Path:
    """``train/`` with one line per step."""
    folder = root / "train"
    folder.mkdir(parents=True)
    rng = random.Random(1)
    lines = [json.dumps(metrics(step, steps, rng)) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("method: {name: diffusion-dpo}\n")
    write_json(folder / "run.json", {"steps": steps, "parameters": 123_456})
    return folder


def add_job(root: Path) -> Path:
    """``job.json`` and ``config.yaml``."""
    (root / "config.yaml").write_text("seed: 0\nevaluate:\n  unguided: {candidates: 1}\n  guided: {candidates: 1}\n")
    stages = [
        {"name": "generate", "seconds": 61.0, "summary": "96 images of 24 prompts"},
        {"name": "score", "seconds": 2.5, "summary": ""},
        {"name": "train", "seconds": 204.2, "summary": "300 steps"},
        {"name": "eval", "seconds": 88.0, "summary": "1536 images"},
    ]
    job = {
        "title": "Quickstart",
        "command": "diffalign quickstart seed=0",
        "seconds": 355.7,
        "stages": stages,
        "versions": {"diffalign": "0.1.0", "torch": "2.13.0"},
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_gib": 7.8, "gpu": None},
    }
    return write_json(root / "job.json", job)


def build(root: Path) -> Path:
    """The whole folder: two evaluations, one of them without a clear change."""
    add_job(root)
    add_pool(root)
    add_training(root)
    add_evaluation(root)
    add_evaluation(
        root, results(0.62, 0.63, name="guided", sampling={"sampler": "euler", "steps": 20, "guidance": 4.0})
    )
    return root
