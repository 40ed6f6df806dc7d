"""The whole chain: 2,000 prompts x 2 models x 4 candidates, three scorers, three methods, killed on the way, judged.

    python benchmarks/data_factory.py --out runs/factory            # half an hour or so on two CPU cores
    python benchmarks/data_factory.py --out runs/small --small      # a few minutes; its numbers mean nothing

Everything is done by command lines in processes of their own. The generation is killed once in the first model and
once in the second, the scoring once; each is started again with the same words. The second model is the first one
after a short Diffusion-DPO run on its own samples. The ensemble that makes the rewards counts wins of the graded
judge, of a small CLIP that was trained on pictures of training prompts, and, with a quarter of the weight, of JPEG
size. Training prompts make the pool, held-out prompts the numbers, and the judge of the tables is the exact binary one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from _results import machine, write_section
from _tiny_clip import make

from diffalign import records
from diffalign.results import Results, number

TITLE = "The data factory, end to end"
MODEL = {"family": "sd3", "path": "embedded:shapes"}
GRADED = {"name": "shapes", "label": "graded", "params": {"metric": "graded"}}
CORRECT = {"name": "shapes", "label": "correct", "params": {"metric": "correct"}}
JPEG = {"name": "jpeg"}
REWARD = {"graded": 1.0, "clip": 1.0, "jpeg": 0.25}
OPTIM = {"lr": 5e-4, "params": {"betas": [0.9, 0.98], "weight_decay": 0.0}, "warmup": 20, "decay": "linear"}
BUILDS: dict[str, dict[str, Any]] = {
    "ranked": {"rule": "ranked", "combine": "wins", "top": 4},
    "soft": {"rule": "all_pairs", "combine": "wins", "per_prompt": 6, "margin": 0.05, "soft": "range"},
    "pairs": {"rule": "all_pairs", "combine": "wins", "per_prompt": 6, "margin": 0.05},
}
METHODS: dict[str, tuple[str, dict[str, Any], int]] = {
    "rank-dpo": ("ranked", {"name": "rank-dpo", "objective": {"beta": 20.0}}, 32),
    "smpo": ("soft", {"name": "smpo", "objective": {"beta": 20.0, "kind": "probability"}}, 64),
    "diffusion-dpo": ("pairs", {"name": "diffusion-dpo", "objective": {"beta": 20.0}}, 64),
}
"""Method -> training records, settings, records per step; a step is 128 images for each."""


class Chain:
    """One folder in which the chain runs, command by command."""

    def __init__(self, root: Path, small: bool) -> None:
        self.root, self.pool = root, root / "pool"
        self.prompts, self.steps, self.judged = (60, 6, 2) if small else (2000, 240, 64)
        self.seconds: dict[str, float] = {}
        self.kills: list[str] = []

    def command(self, verb: str, content: dict[str, Any], name: str) -> list[str]:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))  # the order of the sources counts
        return [sys.executable, "-m", "diffalign", verb, str(path)]

    def run(self, verb: str, content: dict[str, Any], name: str) -> None:
        started = time.perf_counter()
        subprocess.run(self.command(verb, content, name), check=True, stdout=subprocess.DEVNULL)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def kill(self, verb: str, content: dict[str, Any], name: str, output: Path, lines: int) -> None:
        """Run until the output has so many lines, then kill -9."""
        started = time.perf_counter()
        process = subprocess.Popen(self.command(verb, content, name), stdout=subprocess.DEVNULL)
        while process.poll() is None and count(output) < lines:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.kills.append(f"{name} with {count(output)} records in {output.name}")

    # --- stages ---

    def second_model(self) -> str:
        """A LoRA from a short run on the first model's own samples."""
        small = self.steps < 240
        changes = ["quickstart_short" if small else "quickstart", f"dir={self.root / 'second'}", "seed=7"]
        changes += ["train.steps=4"] if small else ["train.steps=80", "generate.prompts.per_task=40"]
        changes += ["evaluate={few: {prompts: {source: 'shapes:heldout', per_task: 1}, sampling: {steps: 2}}}"]
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "diffalign", "quickstart", *changes], check=True, stdout=subprocess.DEVNULL
        )
        self.seconds["second model"] = time.perf_counter() - started
        return str(self.root / "second/train/lora")

    def generate(self, adapter: str) -> None:
        tasks = 6
        content = {
            "model": MODEL,
            "prompts": {"source": "shapes:train", "per_task": -(-self.prompts // tasks), "limit": self.prompts},
            "candidates": 4,
            "sampling": {"steps": 10, "batch": 192},
            "sources": {"base": {}, "aligned": {"model": {**MODEL, "adapter": adapter}, "seed": 1}},
            "out": str(self.pool),
        }
        self.kill("generate", content, "generate", self.pool / "records-base.jsonl", self.prompts // 3)
        self.kill("generate", content, "generate", self.pool / "records-aligned.jsonl", self.prompts // 2)
        self.run("generate", content, "generate")

    def score(self, clip: dict[str, Any]) -> None:
        content = {
            "records": str(self.pool / "records.jsonl"),
            "out": str(self.pool / "scored.jsonl"),
            "scorers": [GRADED, clip, JPEG],
        }
        self.kill("score", content, "score", self.pool / "scored.jsonl", self.prompts // 2)
        self.run("score", content, "score")

    def build(self) -> None:
        for name, rules in BUILDS.items():
            files = {"records": str(self.pool / "scored.jsonl"), "out": str(self.pool / f"{name}.jsonl")}
            self.run("build", {**files, "reward": REWARD, **rules}, f"build {name}")

    def train(self) -> None:
        for name, (data, method, batch) in METHODS.items():
            content = {
                "model": {**MODEL, "lora": {"rank": 16}},
                "data": {"records": str(self.pool / f"{data}.jsonl"), "cache": str(self.root / "cache")},
                "method": method,
                "optim": OPTIM,
                "run": {"dir": str(self.root / name), "steps": self.steps, "batch": batch, "precision": "bf16"},
            }
            self.run("train", content, f"train {name}")

    def evaluate(self, clip: dict[str, Any]) -> dict[str, Results]:
        found = {}
        panel = [GRADED, clip, JPEG, {"name": "diversity"}]
        for name in METHODS:
            out = self.root / "eval" / name
            content = {
                "model": {**MODEL, "adapter": str(self.root / name / "lora")},
                "against": MODEL,
                "prompts": {"source": "shapes:heldout", "per_task": self.judged},
                "candidates": 2,
                "sampling": {"steps": 10, "batch": 192},
                "judge": CORRECT,
                "panel": panel,
                "note": "held-out prompts, unguided",
                "out": str(out),
            }
            self.run("eval", content, f"eval {name}")
            found[name] = Results.model_validate_json((out / "results.json").read_bytes())
        return found


def count(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def difference(measured: Any, digits: int = 3) -> str:
    low, high = (number(end, digits, sign=True) for end in measured.difference_interval)
    values = f"{number(measured.against, digits)} → {number(measured.policy, digits)}"
    return f"{values} ({low} to {high})"


def report(chain: Chain, results: dict[str, Results], clip_accuracy: float, command: str) -> str:
    images = 8 * chain.prompts
    scored = list(records.read(chain.pool / "scored.jsonl"))
    assert len(scored) == chain.prompts
    assert all(len(r.candidates) == 8 and all(len(c.labels) == 3 for c in r.candidates) for r in scored), "nothing lost"
    failed = sum(len(c.errors) for r in scored for c in r.candidates)
    rows = ["| stage | seconds | items per second |", "|---|---:|---:|"]
    builds = sum(v for k, v in chain.seconds.items() if k.startswith("build"))
    for name, seconds, items, unit in (
        ("generate, two models", chain.seconds["generate"], images, "images"),
        ("score, three scorers", chain.seconds["score"], images, "images"),
        ("build, three sets with their pages", builds, 3 * chain.prompts, "records"),
    ):
        rows.append(f"| {name} | {seconds:.0f} | {items / seconds:.0f} {unit} |")
    for name in METHODS:
        seconds, (_, _, batch) = chain.seconds[f"train {name}"], METHODS[name]
        rows.append(f"| train {name} | {seconds:.0f} | {chain.steps * batch / seconds:.0f} records |")
    table = [
        "| method | records | correct | graded | clip | jpeg | diversity | win rate |",
        "|---|---:|---:|---|---|---|---|---|",
    ]
    for name, found in results.items():
        size = sum(1 for _ in records.read(chain.pool / f"{METHODS[name][0]}.jsonl"))
        low, high = found.wins.interval
        cells = [
            difference(found.overall),
            *(difference(found.panel[k]) for k in ("graded", "clip", "jpeg", "diversity")),
        ]
        wins = f"{number(found.wins.policy, 3)} ({number(low, 3)} to {number(high, 3)})"
        table.append(f"| {name} | {size} | {' | '.join(cells)} | {wins} |")
    n = next(iter(results.values())).n
    return "\n\n".join(
        [
            f"`{command}`, {machine()}.",
            f"{chain.prompts} training prompts x 2 models x 4 candidates = {images} images. Killed with SIGKILL: "
            f"{'; '.join(chain.kills)}; started again each time, nothing lost, {failed} scores failed. Times include "
            "start-up, what the kills cost, and for training the encoding.",
            "\n".join(rows),
            f"Held-out prompts, unguided, n = {n} before and after from the same noise, 95 % intervals of the "
            f"difference, paired over prompts; seed 0 alone. {chain.steps} steps of 128 images each; beta 20 and the "
            "quickstart's optimiser for every method, tuned for none of them here. The ensemble's small CLIP names "
            f"{clip_accuracy:.0%} of a last training batch. The binary judge made no reward, its graded form did.",
            "\n".join(table),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/factory"))
    parser.add_argument("--small", action="store_true", help="a few minutes, and no numbers worth keeping")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    chain = Chain(args.out, args.small)
    accuracy = make(args.out / "clip", steps=5 if args.small else 500)
    weights = {"weights": str(args.out / "clip"), "tokenizer": str(args.out / "clip/tokenizer"), "metric": "cosine"}
    clip = {"name": "pickscore", "label": "clip", "params": weights}
    chain.generate(chain.second_model())
    chain.score(clip)
    chain.build()
    chain.train()
    results = chain.evaluate(clip)
    body = report(chain, results, accuracy, f"python benchmarks/data_factory.py --out {args.out}")
    (args.out / "report.md").write_text(body)
    (args.out / "seconds.json").write_text(json.dumps(chain.seconds))
    print(body)
    if not args.small:
        write_section(TITLE, body)


if __name__ == "__main__":
    main()
