"""Diffusion-DPO by diffusers' own scripts and by ``diffalign train``, on the same files: time, memory, gradients.

    python benchmarks/vs_diffusers.py --diffusers PATH     # a clone of huggingface/diffusers; 20 minutes on one core

PATH/examples/research_projects/diffusion_dpo holds ``train_diffusion_dpo.py`` (SD 1.x) and
``train_diffusion_dpo_sdxl.py``; both run unmodified, see ``_vs_script.py``. Both sides read one small pipeline folder
per model and the same JPEG files, and train a LoRA for one epoch with the same batch, precision and number of threads
on the CPU, each run in its own process, in turn. The SD script has no factor one half before beta, the SDXL script has;
ours is told so by ``method.estimate.scale``, and beta is theirs. Needs ``datasets``, ``torchvision`` and
``tensorboard``, which the scripts import.

- first epoch: from the start of the command to its end, with everything it loads, encodes and writes;
- step: the median of the times between the ends of steps, without the first ones;
- warm: ours once more with another beta, so that latents and prompts come from the cache;
- memory: the most that the process had resident.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from _results import machine, write_section
from _vs_data import SIDE, write_pairs, write_pipeline
from _vs_gradient import Agreement, agreement

TITLE = "Against diffusers' scripts"
SCRIPTS = {"sd": ("train_diffusion_dpo.py", 1.0), "sdxl": ("train_diffusion_dpo_sdxl.py", 0.5)}
"""The script of a family, and what it has before beta."""
FOLDER = Path("examples/research_projects/diffusion_dpo")
HERE = Path(__file__).parent
BETA, OTHER_BETA, RANK, LR, SKIPPED = 5000, 2000, 16, 1e-4, 3
TARGETS = {"warm step": 0.60, "first epoch": 0.95, "peak memory": 0.80}
GRADIENT_TARGET = 1e-5


class Cost(NamedTuple):
    """What a run took."""

    step: float
    """Seconds, median."""
    whole: float
    """Seconds."""
    gib: float


def measured(work: Path, log: Path, threads: int, command: list[object]) -> tuple[float, float]:
    """Seconds and GiB of a command, which must succeed."""
    result = work / "measured.json"
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "ACCELERATE_USE_CPU"), "1")
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, HERE / "_measured.py", result, sys.executable, *command]
    with log.open("w") as out:
        subprocess.run(list(map(str, words)), check=True, stdout=out, stderr=subprocess.STDOUT, env=environment)
    found = json.loads(result.read_text())
    if found["status"] != 0:
        sys.exit(f"{log.read_text()[-2000:]}\n{log}: the command failed")
    return found["seconds"], found["gib"]


def median_step(ends: list[float]) -> float:
    """Seconds between the ends of steps, without the first ones."""
    return statistics.median(b - a for a, b in pairwise(ends[SKIPPED - 1 :]))


def theirs(work: Path, kind: str, args: argparse.Namespace, record: str = "-") -> tuple[Path, Cost | None]:
    """One epoch of their script and its folder; or the first step alone, recorded in a precision."""
    folder = Path(tempfile.mkdtemp(prefix=f"theirs-{kind}-", dir=work))
    timed = record == "-"
    settings = {
        "pretrained_model_name_or_path": work / kind,
        "dataset_name": work / "data" / "pick",
        "dataset_split_name": "train",
        "cache_dir": folder / "cache",
        "output_dir": folder / "out",
        "resolution": SIDE,
        "train_batch_size": args.batch,
        "max_train_steps": args.pairs // args.batch if timed else 1,
        "rank": RANK,
        "beta_dpo": BETA,
        "learning_rate": LR,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "max_grad_norm": 1.0 if timed else 1e9,  # a recorded gradient is whole
        "seed": 0,
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    script = args.diffusers / FOLDER / SCRIPTS[kind][0]
    command = [HERE / "_vs_script.py", folder, record, script, *words, "--no_hflip"]
    seconds, gib = measured(work, folder / "log.txt", args.threads, command)
    ends = json.loads((folder / "steps.json").read_text())
    return folder, Cost(median_step(ends), seconds, gib) if timed else None


def method(kind: str, beta: float) -> dict[str, Any]:
    """Their formula in our words."""
    return {"name": "diffusion-dpo", "objective": {"beta": beta}, "estimate": {"scale": SCRIPTS[kind][1]}}


def ours(work: Path, kind: str, args: argparse.Namespace, cache: Path, beta: float) -> Cost:
    """One epoch of ``diffalign train``."""
    folder = Path(tempfile.mkdtemp(prefix=f"ours-{kind}-", dir=work))
    data: dict[str, Any] = {"records": str(work / "data/records.jsonl"), "size": [SIDE, SIDE], "cache": str(cache)}
    if args.bank:
        data["bank"] = args.bank
    content = {
        "model": {"family": kind, "path": str(work / kind), "device": "cpu", "lora": {"rank": RANK}},
        "data": data,
        "method": method(kind, beta),
        "optim": {"name": "adamw", "lr": LR, "params": {"weight_decay": 0.01}, "clip": 1.0},
        "run": {
            "dir": str(folder / "run"),
            "steps": args.pairs // args.batch,
            "batch": args.batch,
            "precision": "fp32",
        },
    }
    config = folder / "train.yaml"
    config.write_text(yaml.safe_dump(content))
    seconds, gib = measured(work, folder / "log.txt", args.threads, ["-m", "diffalign", "train", config])
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return Cost(median_step([row["seconds"] for row in rows]), seconds, gib)


def compare(work: Path, kind: str, args: argparse.Namespace) -> dict[str, Cost]:
    """Medians over the repetitions of theirs, ours with an empty cache, and ours with a full one."""
    taken: dict[str, list[Cost]] = {"diffusers": [], "first": [], "warm": []}
    for repetition in range(args.repeat):
        cache = work / f"cache-{kind}-{repetition}"
        cost = theirs(work, kind, args)[1]
        assert cost
        taken["diffusers"].append(cost)
        taken["first"].append(ours(work, kind, args, cache, BETA))
        taken["warm"].append(ours(work, kind, args, cache, OTHER_BETA))
        for name, costs in taken.items():
            print(kind, repetition, name, costs[-1], flush=True)
    return {name: Cost(*map(statistics.median, zip(*costs, strict=True))) for name, costs in taken.items()}


def gradients(work: Path, kind: str, args: argparse.Namespace) -> dict[str, Agreement]:
    """How the first step's gradients agree, by precision."""
    found = {}
    for dtype in ("float64", "float32"):
        folder = theirs(work, kind, args, dtype)[0]
        found[dtype] = agreement(kind, work / kind, folder / "step.safetensors", method(kind, BETA), RANK)
        print(kind, dtype, found[dtype], flush=True)
    return found


def ratios(costs: dict[str, Cost]) -> dict[str, float]:
    """Ours to theirs, by the names of the targets."""
    base, first, warm = costs["diffusers"], costs["first"], costs["warm"]
    memory = max(first.gib, warm.gib) / base.gib
    return dict(zip(TARGETS, (warm.step / base.step, first.whole / base.whole, memory), strict=True))


def tables(costs: dict[str, dict[str, Cost]], agreements: dict[str, dict[str, Agreement]]) -> str:
    """What was measured, the ratios with their aims, and the gradients."""
    names = {"diffusers": "diffusers", "first": "ours, empty cache", "warm": "ours, full cache"}
    lines = ["| model | run | s per step | s per epoch, all included | peak GiB |", "|---|---|---:|---:|---:|"]
    for kind, found in costs.items():
        lines += [f"| {kind} | {names[n]} | {c.step:.2f} | {c.whole:.1f} | {c.gib:.2f} |" for n, c in found.items()]
    aims = [f"{name} (aim {aim:.2f})" for name, aim in TARGETS.items()]
    lines += ["", "| model | " + " | ".join(aims) + " |", "|---|" + "---:|" * len(aims)]
    for kind, found in costs.items():
        lines.append(f"| {kind} | " + " | ".join(f"{value:.2f}" for value in ratios(found).values()) + " |")
    lines += ["", f"| model | gradients | float64 (aim {GRADIENT_TARGET:.0e}) | float32 |", "|---|---:|---:|---:|"]
    for kind, by_dtype in agreements.items():
        worst = " | ".join(f"{found.gradient:.1e}" for found in by_dtype.values())
        lines.append(f"| {kind} | {by_dtype['float64'].tensors} | {worst} |")
    return "\n".join(lines)


def commit(clone: Path) -> str:
    """Which commit of diffusers the scripts are from, as far as the clone tells."""
    done = subprocess.run(["git", "-C", str(clone), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 and (clone / ".git").exists() else "unknown"


def report(table: str, args: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    bank = f" --bank {args.bank}" if args.bank else ""
    given = f"--pairs {args.pairs} --batch {args.batch} --repeat {args.repeat} --threads {args.threads}{bank}"
    parts = [
        f"`python benchmarks/vs_diffusers.py --diffusers PATH {given}`, {machine()}; scripts of diffusers at commit "
        f"{commit(args.diffusers)}.",
        f"`train_diffusion_dpo.py` and `train_diffusion_dpo_sdxl.py`, unmodified, and `diffalign train` on the same "
        f"small pipelines and {args.pairs} pairs of {SIDE} x {SIDE} pixels: LoRA of rank {RANK}, beta {BETA} in the "
        f"script's unit, fp32, batch {args.batch}, no checkpointing; medians of {args.repeat} runs in turn. A step is "
        f"the median without the first {SKIPPED}; an epoch is the whole command, imports and saving included. "
        "Encoding an image costs 1.20 (SD) and 0.73 (SDXL) UNet forwards; in the published sizes, at 512 and 1024 "
        "pixels, 1.39 and 0.72.",
        table,
        "Gradients: the first step's LoRA gradients from the same latents, noise, times, text states and weights; "
        "largest difference over all of them, relative to the largest value of the tensor. In float64 the networks of "
        "both sides run in double precision (the script's loss stays in float32), which leaves the formulas; in "
        "float32 both sides round, and the gradients of the two images of a pair nearly cancel.",
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a local clone of huggingface/diffusers")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--bank", type=int, default=0, help="data.bank of our runs; 0: without it")
    parser.add_argument("--work", type=Path, help="new folder to work in (default: a temporary one)")
    args = parser.parse_args()
    args.diffusers = args.diffusers.resolve()
    for script, _ in SCRIPTS.values():
        if not (args.diffusers / FOLDER / script).is_file():
            sys.exit(f"--diffusers: {args.diffusers / FOLDER / script} is not there; give a clone that has it")
    if args.pairs // args.batch < SKIPPED + 2:
        sys.exit(f"--pairs: an epoch needs at least {SKIPPED + 2} steps")
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        write_pairs(work / "data", args.pairs)
        for kind in SCRIPTS:
            write_pipeline(kind, work / kind)
        costs = {kind: compare(work, kind, args) for kind in SCRIPTS}
        agreements = {kind: gradients(work, kind, args) for kind in SCRIPTS}
    table = tables(costs, agreements)
    print(table)
    write_section(TITLE, report(table, args))
    if any(found["float64"].gradient > GRADIENT_TARGET for found in agreements.values()):
        sys.exit("a gradient differs from that of the script's loss")


if __name__ == "__main__":
    main()
