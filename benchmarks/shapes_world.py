"""The embedded default, measured: the judge on clean and damaged renders, the VAE's ceiling, the model's score.

    python benchmarks/shapes_world.py --curve runs/pretrain/transformer.jsonl

About three minutes on two CPU cores. Writes its section of RESULTS.md; the curve is what pre-training logged.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _results import machine, write_section
from torch import Tensor

from diffalign.comparison import compare
from diffalign.families.base import load_family
from diffalign.generate import candidate_seed, sample_media
from diffalign.results import Results, markdown_table
from diffalign.types import Request, Sampling
from diffalign.worlds.shapes.judge import Verdict, judge
from diffalign.worlds.shapes.prompts import TASKS, Metadata, all_prompts, prompts
from diffalign.worlds.shapes.render import render_prompts

PER_TASK = 128


def balanced(pool: dict[str, list[Metadata]], per_task: int) -> list[Metadata]:
    return [pool[task][i % len(pool[task])] for task in TASKS for i in range(per_task)]


def blurred(images: Tensor, sigma: float) -> Tensor:
    axis = torch.arange(-4, 5, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (axis / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1)
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[:, :, None], groups=3), kernel[..., None], groups=3)


def summary(name: str, verdicts: list[Verdict]) -> str:
    correct, strict, graded = np.mean([[v.correct, v.strict, v.graded] for v in verdicts], axis=0)
    return f"| {name} | {correct:.3f} | {strict:.3f} | {graded:.3f} |"


def judge_table() -> list[str]:
    """The judge on 3,000 renders of all tasks, and on damaged copies of them."""
    generator = torch.Generator().manual_seed(2_000)
    batch = balanced({t: [m for m in all_prompts() if m["tag"] == t] for t in TASKS}, 500)
    clean = render_prompts(batch, generator)
    noise = torch.randn(clean.shape, generator=generator)
    mixed = torch.randperm(len(clean), generator=generator)
    small = F.interpolate(clean, size=24, mode="bilinear", antialias=True)
    family = load_family("sd3", "embedded:shapes")
    posteriors = [family.encode_media(part * 2 - 1) for part in clean.split(500)]
    rebuilt = torch.cat([family.decode(family.latents(mean, logvar)) for mean, logvar in posteriors])
    rows = {
        "clean renders": clean,
        "Gaussian blur, sigma 0.5 px": blurred(clean, 0.5),
        "Gaussian blur, sigma 0.8 px": blurred(clean, 0.8),
        "pixel noise, sigma 0.03": clean + 0.03 * noise,
        "pixel noise, sigma 0.06": clean + 0.06 * noise,
        "resized 32 -> 24 -> 32": F.interpolate(small, size=32, mode="bilinear"),
        "through the VAE (the ceiling of any sample)": rebuilt,
        "scored on another image's prompt (the floor)": clean[mixed],
    }
    lines = ["| 3,000 renders, all tasks | correct | strict | graded |", "|---|---:|---:|---:|"]
    return lines + [summary(name, judge(images, batch)) for name, images in rows.items()]


def model_table(guidance: float, steps: int) -> str:
    """768 held-out samples: equal shares of six tasks, fp32, our sampler, 95 % bootstrap intervals over prompts."""
    family = load_family("sd3", "embedded:shapes")
    batch = balanced({t: prompts("heldout", t) for t in TASKS}, PER_TASK)
    requests = [Request(m["prompt"], candidate_seed(77, str(i), 0)) for i, m in enumerate(batch)]
    sampling = Sampling(steps=steps, guidance=guidance)
    started = time.perf_counter()
    chunks = [sample_media(family, requests[i : i + 192], sampling) for i in range(0, len(requests), 192)]
    rate = len(batch) / (time.perf_counter() - started)
    verdicts = judge(torch.cat(chunks), batch)
    found: dict[str, dict[str, list[float]]] = {}
    for metadata, verdict in zip(batch, verdicts, strict=True):
        found.setdefault(metadata["tag"], {}).setdefault(metadata["prompt"], []).append(float(verdict.correct))
    rows = compare(found)
    overall = rows.pop("overall")
    counts = {"n": len(batch), "prompts": sum(map(len, found.values()))}
    results = Results(name="base", judge="shapes", metric="correct", overall=overall, tasks=rows, **counts)
    strict, graded = (np.mean([getattr(v, name) for v in verdicts]) for name in ("strict", "graded"))
    head = (
        f"Guidance {guidance:g}, {steps} steps, fp32, {rate:.0f} images/s (strict {strict:.3f}, graded {graded:.3f}):"
    )
    return f"{head}\n\n{markdown_table(results.model_dump())}"


def curve(log: Path) -> str:
    """The held-out scores that pre-training logged: 192 images, guidance 3, 20 steps, averaged weights."""
    points = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if "heldout" in line]
    columns = [*TASKS, "average"]
    lines = [f"| step | images seen | {' | '.join(columns)} |", "|---:" * (len(columns) + 2) + "|"]
    for point in points:
        scores = " | ".join(f"{point['heldout'][name]:.2f}" for name in columns)
        lines.append(f"| {point['step']} | {point['samples'] / 1000:.0f} k | {scores} |")
    return "\n".join(["Pre-training curve (192 held-out images, guidance 3, 20 steps, averaged weights):", "", *lines])


def main() -> None:
    """Measure everything and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=Path, help="transformer.jsonl of the pre-training run")
    args = parser.parse_args()
    held_out = "Held-out prompts (`single_object` repeats its five prompts, which training has seen), binary judge:"
    command = f"`python benchmarks/shapes_world.py`, {machine()}."
    parts = [command, "\n".join(judge_table()), held_out, model_table(3.0, 20), model_table(1.0, 20)]
    if args.curve:
        parts.append(curve(args.curve))
    write_section("The embedded world", "\n\n".join(part.strip() for part in parts))


if __name__ == "__main__":
    main()
