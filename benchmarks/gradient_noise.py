"""How much of an online method's first gradient is signal: independent estimates of it, compared.

    python benchmarks/gradient_noise.py             # every online method of the arena: ten minutes on a core
    python benchmarks/gradient_noise.py --check     # the same without a section in RESULTS.md

Each estimate is one ``diffalign train`` of one round and one SGD step from the same LoRA, whose second factors are
zero: what they become is the gradient. Rounds differ in their seed, so the cosine between two estimates of a method is
the share of signal in the square of their norm. Prompts are training prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _results import machine, write_section
from safetensors.torch import load_file
from torch import Tensor

from diffalign import config as cfg
from diffalign.arena.plan import Plan
from diffalign.config.file import load
from diffalign.train import online

TITLE = "Noise of a policy's gradient"


def train(arena: cfg.ArenaConfig, name: str, folder: Path, run: dict[str, Any], start: Path | None) -> None:
    """One round of that many samples and one SGD step at rate 1, unless ``run`` says otherwise."""
    prompts = arena.evaluate.prompts
    config = Plan(arena, name, run["seed"], run["lr"], arena.budget, prompts, (1.0,), folder, False).training(1)
    assert config.online
    assert config.model.lora
    changes = {
        "model": config.model.model_copy(
            update={"lora": config.model.lora.model_copy(update={"start": start and str(start)})}
        ),
        "online": config.online.model_copy(update={"groups": run["samples"] // config.online.samples, "updates": 1}),
        "optim": cfg.OptimConfig(name="sgd", lr=run["lr"], clip=None),
        "run": config.run.model_copy(
            update={"dir": str(folder), "steps": 1, "precision": "fp32", "snapshots": False, "resume": None}
        ),
    }
    online.run(config.model_copy(update=changes))


def second_factors(folder: Path) -> Tensor:
    """All of a LoRA, in one row."""
    found = load_file(folder / "lora/pytorch_lora_weights.safetensors")
    return torch.cat([found[name].flatten().double() for name in sorted(found) if "lora_B" in name])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, 0))


def evaluations(folder: Path) -> int:
    return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["evaluations"])


def estimates(arena: cfg.ArenaConfig, names: list[str], args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Gradients and network evaluations per estimate of every method."""
    nothing = {"samples": 2 * arena.rounds.samples, "seed": 0, "lr": 1e-30}
    train(arena, names[0], root / "start", nothing, None)
    found: dict[str, Any] = {}
    for name in names:
        folders = [root / f"{name}-{seed}" for seed in range(args.estimates)]
        for seed, folder in enumerate(folders):
            run = {"samples": args.samples, "seed": seed + 1, "lr": 1.0}
            train(arena, name, folder, run, root / "start/lora")
        found[name] = [second_factors(folder) for folder in folders], evaluations(folders[0])
    return found


def table(arena: cfg.ArenaConfig, found: dict[str, Any], args: argparse.Namespace) -> str:
    """A line per method, the least noisy first."""
    other = next(iter(found))
    head = ["method", "cosine of two estimates", "samples for half signal", "evaluations for it"]
    lines = [f"| {' | '.join([*head, f'cosine with {arena.entries[other].title}'])} |", "|---|---:|---:|---:|---:|"]
    rows = []
    for name, (gradients, counted) in found.items():
        within = [cosine(a, b) for a, b in itertools.combinations(gradients, 2)]
        # not of the same seed: some methods share their rollouts then
        across = [
            cosine(a, b)
            for (i, a), (j, b) in itertools.product(enumerate(gradients), enumerate(found[other][0]))
            if i != j
        ]
        signal = statistics.mean(within)
        needed = args.samples * (1 - signal) / signal if signal > 0.01 else math.inf
        cost = needed * counted / args.samples
        shown = [f"{value:,.0f}" if math.isfinite(value) else "not resolved" for value in (needed, cost)]
        spread = f"{signal:.3f} ({min(within):.3f} to {max(within):.3f})"
        with_other = f"{statistics.mean(across):.3f}"
        rows.append((signal, f"| {arena.entries[name].title} | {spread} | {' | '.join(shown)} | {with_other} |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows, reverse=True))])


def report(shown: str, args: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    return "\n\n".join(
        [
            f"`python benchmarks/gradient_noise.py --samples {args.samples} --estimates {args.estimates}`, "
            f"{machine()}.",
            f"The base of the arena with a LoRA that changes nothing yet, fp32; {args.estimates} estimates of each "
            f"method's gradient from {args.samples} samples of their own; mean and range of the cosines between them. "
            "A cosine c of estimates from n samples means that n (1 - c) / c samples give a gradient whose square is "
            "half signal; below 0.01 it is not resolved.",
            shown,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/arena/shapes.yaml")
    parser.add_argument("--only", nargs="*", help="entries of it; the first is what others are compared with")
    parser.add_argument("--samples", type=int, default=768, help="per estimate")
    parser.add_argument("--estimates", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="write no section")
    args = parser.parse_args()
    arena = load(cfg.ArenaConfig, args.config)
    able = [name for name, entry in arena.entries.items() if entry.online is not None and entry.build is None]
    unknown = set(args.only or ()) - set(able)
    if unknown:
        sys.exit(f"not an online method of {args.config} without a pool: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        shown = table(arena, estimates(arena, args.only or able, args, Path(temporary)), args)
    print(shown)
    if not args.check:
        write_section(TITLE, report(shown, args))


if __name__ == "__main__":
    main()
