"""Rollouts of online training against the stock pipeline and against the bare network; and what a round of AWM takes.

    python benchmarks/rollout.py             # the embedded model: a few minutes
    python benchmarks/rollout.py --threads 1 --batch 64
    python benchmarks/rollout.py --check     # the same without a section in RESULTS.md

Every repetition samples other prompts with each way in turn, and ratios are taken within a repetition:

- samples alone: ``train.rollout.Roller`` with the sampler euler, which keeps nothing;
- transitions: the same with stochastic steps, which are kept for training;
- diffusers: ``StableDiffusion3Pipeline``, a call per prompt with ``num_images_per_prompt``;
- bare: the network's forwards on noise at our batch, nothing else: the most that a rollout can reach.

Prompts are encoded in all but the last. The second half trains AWM by ``diffalign train`` and reads its metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _results import machine, write_section
from torch import Tensor

from diffalign import config as cfg
from diffalign.config.file import validate
from diffalign.families.base import EMBEDDED, load_family
from diffalign.records import Record
from diffalign.train import online
from diffalign.train.core import places
from diffalign.train.rollout import Group, Roller
from diffalign.train.run import Run
from diffalign.types import Request
from diffalign.worlds import load_prompts

TITLE = "Rollouts, threads: {}"
TARGETS = {"diffusers": 1.5, "bare": 0.9}
"""Least images per second of a rollout that keeps nothing, in those of another way."""
ROLES = 2
"""Frozen roles of AWM as released: reference and average."""
DIFFERENTIATED = 3
"""Evaluations that a forward and its backward count as."""

Way = Callable[[list[str]], Tensor]
"""Prompts -> latents or images."""
Kernels = Callable[[], AbstractContextManager]


# --- sampling -------------------------------------------------------------------------------------------------------


def our_way(family: Any, keep: Any, kernels: Kernels, args: argparse.Namespace) -> Way:
    """A round's samples, as online training makes them."""
    roller = Roller(family, cfg.SamplingConfig(steps=args.steps, batch=args.batch), args.samples, keep)

    def sample(prompts: list[str]) -> Tensor:
        groups = [Group(Record(id=str(n), prompt=prompt), n) for n, prompt in enumerate(prompts)]
        with kernels():
            cond = family.condition([Request(prompt, 0) for prompt in prompts], None)
            return torch.cat([chunk.latents for chunk in roller(family.net, 0, groups, cond)])

    return sample


def bare_way(family: Any, kernels: Kernels, args: argparse.Namespace) -> Way:
    """As many forwards of the network on as many rows."""
    shape, whole = family.latent_shape(None), family.encode_prompt(["a photo of a red circle"] * args.batch)

    def forward(prompts: list[str]) -> Tensor:
        total, done = len(prompts) * args.samples, []
        with kernels(), torch.inference_mode():
            for first in range(0, total, args.batch):
                rows = min(args.batch, total - first)
                cond = {name: value[:rows] for name, value in whole.items()}
                x, t = torch.randn(rows, *shape), torch.full((rows,), 0.5)
                for _ in range(args.steps):
                    found = family.predict(family.net, x, t, cond)
                done.append(found)
        return torch.cat(done)

    return forward


def stock_way(pipe: Any, output: str, args: argparse.Namespace) -> Way:
    """A call of the stock pipeline per prompt."""

    def sample(prompts: list[str]) -> Tensor:
        more = {"num_inference_steps": args.steps, "guidance_scale": 1.0, "max_sequence_length": 0}
        made = [
            pipe(prompt, num_images_per_prompt=args.samples, output_type=output, **more).images for prompt in prompts
        ]
        return torch.cat(made)

    return sample


def ways(args: argparse.Namespace, folder: Path) -> dict[str, Way]:
    """All that is compared, on two instances of one model."""
    import diffusers

    family = load_family("sd3", "embedded:shapes", "cpu")
    family.net.requires_grad_(False)
    # attention as a run chooses it for samples of this size
    run = Run(folder, family.device, "fp32", 0, 1)
    kernels = partial(run.kernels, places(family.latent_shape(None)))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(EMBEDDED["shapes"], text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    alone = our_way(family, "nothing", kernels, args)

    def decoded(prompts: list[str]) -> Tensor:
        latents = alone(prompts)
        return torch.cat([family.decode(part) for part in latents.split(args.batch)])

    return {
        "samples alone": alone,
        "transitions": our_way(family, "transitions", kernels, args),
        "diffusers": stock_way(pipe, "latent", args),
        "bare": bare_way(family, kernels, args),
        "samples alone, decoded": decoded,
        "diffusers, decoded": stock_way(pipe, "pt", args),
    }


def rates(args: argparse.Namespace, found: dict[str, Way]) -> dict[str, list[float]]:
    """Images per second of every way, a number per repetition; the first repetition warms up and does not count."""
    texts = [row["prompt"] for row in load_prompts("shapes", "train")]
    taken: dict[str, list[float]] = {name: [] for name in found}
    order = list(found)
    for repetition in range(args.repeat + 1):
        first = repetition * args.prompts
        prompts = [texts[(first + n) % len(texts)] for n in range(args.prompts)]
        for name in order[repetition % len(order) :] + order[: repetition % len(order)]:
            begun = time.perf_counter()
            made = found[name](prompts)
            seconds = time.perf_counter() - begun
            if len(made) != args.prompts * args.samples:
                sys.exit(f"{name}: {len(made)} samples of {args.prompts} x {args.samples}")
            if repetition:
                taken[name].append(len(made) / seconds)
        print(repetition, {name: round(values[-1], 1) for name, values in taken.items() if values}, flush=True)
    return taken


def spread(values: Iterable[float], digits: int) -> str:
    """Median and range."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f})"


def ratio(taken: dict[str, list[float]], mine: str, other: str) -> list[float]:
    """Of two ways, within repetitions."""
    return [a / b for a, b in zip(taken[mine], taken[other], strict=True)]


def sampling_tables(taken: dict[str, list[float]]) -> str:
    """Rates, and ratios with their aims."""
    lines = ["| way | images/s |", "|---|---:|"]
    lines += [f"| {name} | {spread(values, 1)} |" for name, values in taken.items()]
    lines += ["", "| ratio of images/s | median (range) | aim |", "|---|---:|---:|"]
    compared = [("samples alone", other) for other in TARGETS] + [("transitions", other) for other in TARGETS]
    for mine, other in [*compared, ("samples alone, decoded", "diffusers, decoded")]:
        aim = f"{TARGETS[other]:.1f}" if mine == "samples alone" else ""
        lines.append(f"| {mine} / {other} | {spread(ratio(taken, mine, other), 2)} | {aim} |")
    return "\n".join(lines)


# --- a round of AWM -------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The metrics of every round of a run, the first, which warms up, left out."""
    content = {
        "model": {"family": "sd3", "path": "embedded:shapes", "device": "cpu", "lora": {"rank": 16}},
        "online": {
            "prompts": {"source": "shapes:train"},
            "groups": args.prompts,
            "samples": args.samples,
            "sampling": {"sampler": "sa_solver", "steps": args.steps, "batch": args.batch},
            "tau": 0.4,
            "scorers": [{"name": "shapes", "label": "graded", "params": {"metric": "graded"}}],
        },
        "method": {"name": "awm-released", "draw": {"count": args.times, "steps": args.steps}},
        "optim": {"lr": 1e-4},
        "run": {"dir": str(folder / "run"), "steps": args.rounds + 1, "batch": args.micro},
    }
    online.run(validate(cfg.TrainConfig, content))
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return rows[1:]


def accounted(args: argparse.Namespace) -> int:
    """Evaluations of a round by the published configurations: ``N (T_rollout + T (3 + frozen roles))``."""
    return args.prompts * args.samples * (args.steps + args.times * (DIFFERENTIATED + ROLES))


def round_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Where a round's time goes, and what it counts."""
    column = {name: [row[f"seconds/{name}"] for row in rows] for name in ("rollout", "score", "wait", "update")}
    hidden = [1 - wait / score for wait, score in zip(column["wait"], column["score"], strict=True)]
    whole = [a + b + c for a, b, c in zip(column["rollout"], column["wait"], column["update"], strict=True)]
    serial = [
        (total - wait + score) / total
        for total, wait, score in zip(whole, column["wait"], column["score"], strict=True)
    ]
    counted = sorted({int(row["evaluations"]) for row in rows})
    lines = ["| of a round of AWM | median (range) |", "|---|---:|"]
    lines += [f"| {name}, s | {spread(values, 2)} |" for name, values in column.items()]
    lines += [
        f"| share of scoring that the rollout hides | {spread(hidden, 2)} |",
        f"| round one after the other / round | {spread(serial, 2)} |",
        f"| network evaluations | {', '.join(f'{count:,}' for count in counted)} |",
        f"| by the published accounting | {accounted(args):,} |",
    ]
    return "\n".join(lines)


# --- the section ----------------------------------------------------------------------------------------------------


def report(sampling: str, rounds: str, args: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    given = " ".join(f"--{key} {value}" for key, value in vars(args).items() if key != "check")
    parts = [
        f"`python benchmarks/rollout.py {given}`, {machine()}.",
        f"The embedded model without LoRA, fp32, no guidance, {args.steps} steps, {args.prompts} prompts x "
        f"{args.samples} samples per repetition, our batch {args.batch}; every repetition runs all ways in turn on "
        f"prompts of its own, medians and ranges of {args.repeat}. Latents alone, unless decoded.",
        sampling,
        f"AWM as released on the same model with a LoRA of rank 16: {args.prompts} prompts x {args.samples} samples, "
        f"SA-Solver of {args.steps} steps, {args.times} training times, micro-batches of {args.micro}, the graded "
        f"judge as reward; {args.rounds} rounds after one that warms up. Wait is what remains of scoring when the last "
        "sample is made. The accounting: per sample the solver's steps, and per training time 3 for a forward with its "
        "backward and 1 for each of the two frozen roles.",
        rounds,
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--batch", type=int, default=192, help="samples per forward of our rollout")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--times", type=int, default=6, help="training times of AWM")
    parser.add_argument("--micro", type=int, default=16, help="samples per micro-step of AWM")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", action="store_true", help="write no section")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        taken = rates(args, ways(args, Path(temporary)))
        rows = train(args, Path(temporary))
    sampling, rounds = sampling_tables(taken), round_table(rows, args)
    print(f"{sampling}\n\n{rounds}")
    if any(int(row["evaluations"]) != accounted(args) for row in rows):
        sys.exit("the evaluations of a round are not those of the published accounting")
    if not args.check:
        write_section(TITLE.format(args.threads), report(sampling, rounds, args))


if __name__ == "__main__":
    main()
