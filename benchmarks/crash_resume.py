"""Kill -9 a training run at random moments, resume it, and compare the result with an undisturbed run, bit for bit.

    python benchmarks/crash_resume.py             # 20 kills of a 60-step run: about ten minutes on one CPU core

Every trial is a new run in its own folder and process: it starts, is killed at a moment drawn uniformly from the
duration of the undisturbed run, and is continued with ``--resume latest``. The embedded model and the quickstart's
settings at batch 16, with an average of the weights and a checkpoint after every step, so that kills find one half
written. Each trial has its own latent cache too, so that a kill can land in the encoding.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from _results import machine, write_section
from safetensors.torch import load_file

TITLE = "Crash and resume"
MODEL = {"family": "sd3", "path": "embedded:shapes", "device": "cpu"}


class Trial(NamedTuple):
    """One kill and what came of it."""

    seconds: float
    phase: str
    steps: int
    checkpoints: int
    identical: bool


def diffalign(*words: object) -> list[str]:
    return [sys.executable, "-m", "diffalign", *map(str, words)]


def run(*words: object) -> float:
    """Seconds that a command line takes."""
    started = time.perf_counter()
    subprocess.run(diffalign(*words), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def make_pairs(work: Path) -> Path:
    """Training pairs from the embedded model, as the quickstart makes them."""
    pool = work / "pool"
    sampling = {"steps": 10, "batch": 192}
    prompts = {"source": "shapes:train", "per_task": 8}
    settings = {"model": MODEL, "prompts": prompts, "candidates": 4, "sampling": sampling, "out": str(pool)}
    run("generate", write(work / "generate.yaml", settings))
    scored, pairs = pool / "scored.jsonl", pool / "pairs.jsonl"
    scorer = {"name": "shapes", "label": "graded", "params": {"metric": "graded"}}
    settings = {"records": str(pool / "records.jsonl"), "out": str(scored), "scorers": [scorer]}
    run("score", write(work / "score.yaml", settings))
    settings = {"records": str(scored), "out": str(pairs), "reward": {"graded": 1.0}, "rule": "all_pairs"}
    run("build", write(work / "build.yaml", settings))
    return pairs


def train_config(work: Path, pairs: Path, args: argparse.Namespace) -> Path:
    params = {"betas": [0.9, 0.98], "weight_decay": 0.0}
    content = {
        "model": {**MODEL, "lora": {"rank": 16}},
        "data": {"records": str(pairs)},
        "method": {"name": "diffusion-dpo", "objective": {"beta": 200.0}},
        "optim": {"name": "adamw", "lr": 1e-3, "params": params, "warmup": 20, "decay": "linear"},
        "run": {
            "dir": str(work / "whole"),
            "steps": args.steps,
            "batch": args.batch,
            "precision": "bf16",
            "save_every": args.save_every,
            "ema": 0.99,
        },
    }
    return write(work / "train.yaml", content)


def train_words(config: Path, folder: Path) -> list[object]:
    cache = folder.with_name(f"{folder.name}-cache")
    return ["train", config, f"run.dir={folder}", f"data.cache={cache}", "--resume", "latest"]


def metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{key: value for key, value in row.items() if key not in ("seconds", "cpu", "memory")} for row in rows]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights and everything in the last checkpoint that is a tensor."""
    last = max(folder.glob("checkpoint-*"))
    state = torch.load(last / "state.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, row in state["optimizer"]["state"].items() for k, v in row.items()}
    files = (folder / "lora" / "pytorch_lora_weights.safetensors", last / "weights.safetensors")
    return {**moments, **{f"{path.name}.{k}": v for path in files for k, v in load_file(path).items()}}


def same(ours: Path, whole: Path) -> bool:
    """Weights, average, optimiser moments and every metric of every step but the clock."""
    a, b = tensors(ours), tensors(whole)
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return equal and metrics(ours) == metrics(whole)


def phase(folder: Path, steps: int, total: int) -> str:
    """What the killed process was doing, from what it left."""
    if list(folder.glob(".checkpoint-*.tmp")):
        return "writing a checkpoint"
    if steps == 0:
        return "starting up"
    return "exporting" if steps == total else "training"


def trial(config: Path, folder: Path, whole: Path, seconds: float, total: int) -> Trial | None:
    """One kill and one resumption; None when the run had ended before."""
    words = train_words(config, folder)
    process = subprocess.Popen(diffalign(*words), stdout=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return None
    except subprocess.TimeoutExpired:
        process.kill()
    if process.wait() != -signal.SIGKILL:
        return None
    lines = folder / "metrics.jsonl"
    steps = lines.read_bytes().count(b"\n") if lines.is_file() else 0
    checkpoints = len(list(folder.glob("checkpoint-*")))
    doing = phase(folder, steps, total)
    run(*words)
    return Trial(seconds, doing, steps, checkpoints, same(folder, whole))


def report(trials: list[Trial], late: int, duration: float, start: float, args: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    given = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in vars(args).items() if key != "work")
    threads = torch.get_num_threads()
    identical = sum(t.identical for t in trials)
    phases = ", ".join(f"{count} {name}" for name, count in Counter(t.phase for t in trials).most_common())
    lines = [
        "| kill | at second | found while | steps logged | checkpoints | bit-identical |",
        "|---:|---:|---|---:|---:|---|",
    ]
    for i, t in enumerate(trials, 1):
        verdict = "yes" if t.identical else "NO"
        lines.append(f"| {i} | {t.seconds:.1f} | {t.phase} | {t.steps} | {t.checkpoints} | {verdict} |")
    parts = [
        f"`python benchmarks/crash_resume.py {given}`, {machine()}, torch threads: {threads}.",
        f"**{identical} of {len(trials)} killed and resumed runs are bit-identical to the undisturbed run**: exported "
        "LoRA, trained weights, their average, the optimiser's moments, and all metrics of all "
        f"{args.steps} steps.",
        f"Each run was killed with SIGKILL at a moment drawn uniformly from the {duration:.1f} s that the undisturbed "
        f"run took, {start:.1f} s of them before its first step was logged: {phases}. {late} further draws came after "
        "the end of their run and were drawn again. Two checkpoints are kept at a time; a run killed before its first "
        "one starts again.",
        "\n".join(lines),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        config = train_config(work, make_pairs(work), args)
        whole = work / "whole"
        duration = run(*train_words(config, whole))
        rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        start = duration - (json.loads((whole / "run.json").read_text())["seconds"] - rows[0]["seconds"])
        print(f"undisturbed: {duration:.1f} s, first step after {start:.1f} s", flush=True)
        moments, trials, late = random.Random(args.seed), [], 0
        while len(trials) < args.kills:
            folder = work / f"trial-{len(trials):02d}"
            result = trial(config, folder, whole, moments.uniform(0, duration), args.steps)
            if result is None:
                print("the run had ended before the kill; another moment", flush=True)
                late += 1
                shutil.rmtree(folder)
                continue
            trials.append(result)
            print(len(trials), *result, flush=True)
        write_section(TITLE, report(trials, late, duration, start, args))
        if not all(t.identical for t in trials):
            sys.exit("a resumed run differs from the undisturbed one")


if __name__ == "__main__":
    main()
