"""The quickstart with three seeds: gain on held-out prompts with paired intervals, time per stage, peak memory.

    python benchmarks/quickstart_seeds.py --out runs/quickstart_seeds
    python benchmarks/quickstart_seeds.py --out runs/quickstart_seeds_text --kind text
    python benchmarks/quickstart_seeds.py --out runs/quickstart_seeds_awm --kind awm

The seed decides the training pool, the LoRA's start and every draw of training; the evaluation's prompts and noise are
the same for all seeds. Writes its section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from _results import machine, write_section

from diffalign.results import Results, number

KINDS = {
    "image": ("Quickstart", []),
    "text": ("Quickstart, text", ["--text"]),
    "awm": ("Quickstart, online", ["--method", "awm"]),
}
SETTINGS = {
    "Quickstart, online": "Training reward: the graded judge and half the binary one, on training prompts. Scores: the "
    "binary judge on held-out prompts",
    "Quickstart": "Training reward: the graded judge on training prompts. Scores: the binary judge on held-out prompts",
    "Quickstart, text": "Training reward and scores: the exact judge, on training and on held-out prompts",
}


def run(out: Path, seed: int, options: list[str]) -> tuple[float, float]:
    """Wall seconds of the whole process, start-up included, and the peak resident memory in GiB of all runs so far."""
    started = time.perf_counter()
    words = ["quickstart", *options, f"dir={out}", f"seed={seed}"]
    subprocess.run([sys.executable, "-m", "diffalign", *words], check=True)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def row(out: Path, seed: int, name: str) -> str:
    """One line of the table."""
    results = Results.model_validate_json((out / "eval" / name / "results.json").read_text(encoding="utf-8"))
    found = results.overall
    if found.against is None or found.difference is None or found.difference_interval is None:
        raise SystemExit(f"{out}: evaluation {name} has no baseline")
    low, high = (number(end, 3, sign=True) for end in found.difference_interval)
    gain = f"{number(found.difference, 3, sign=True)} ({low} to {high})"
    return f"| {seed} | {name} | {number(found.against, 3)} | {number(found.policy, 3)} | {gain} | {results.n} |"


def main() -> None:
    """Run all seeds one after the other and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=KINDS, default="image")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    title, options = KINDS[args.kind]
    gains = [
        "| seed | evaluation | before | after | gain (95 % interval, paired over prompts) | n |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    costs = ["| seed | total s | seconds per stage |", "|---:|---:|---|"]
    memory = 0.0
    for seed in args.seeds:
        out = args.out / f"seed{seed}"
        seconds, memory = run(out, seed, options)
        job = json.loads((out / "job.json").read_text(encoding="utf-8"))
        gains += [row(out, seed, path.name) for path in sorted((out / "eval").iterdir(), reverse=True)]
        stages = ", ".join(f"{stage['name']} {stage['seconds']:.0f}" for stage in job["stages"])
        costs.append(f"| {seed} | {seconds:.0f} | {stages} |")
    kind = "" if args.kind == "image" else f"_{args.kind} --kind {args.kind}"
    command = f"python benchmarks/quickstart_seeds.py --out runs/quickstart_seeds{kind}"
    note = (
        f"`{command}`, {machine()}. {SETTINGS[title]}, fp32, before and after on the same prompts and noise. Peak "
        f"resident memory over all runs: {memory:.2f} GiB."
    )
    write_section(title, "\n\n".join([note, "\n".join(gains), "\n".join(costs)]))


if __name__ == "__main__":
    main()
