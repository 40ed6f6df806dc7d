"""One cell of an arena: an entry with a seed and a learning rate, trained to a budget and judged on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign import build, generate, held_out, models, score
from diffalign import config as cfg
from diffalign import records as store
from diffalign.arena.scores import Snapshot
from diffalign.files import write_json
from diffalign.generate import make_sampling
from diffalign.prompts import read_prompts
from diffalign.randomness import keyed
from diffalign.records import Record
from diffalign.rewards import level
from diffalign.train import offline, online
from diffalign.train.experts import best
from diffalign.train.run import snapshots

KL_SAMPLES, NOISE_LEVEL = 128, 0.7


@dataclass(frozen=True)
class Plan:
    """A cell to run."""

    config: cfg.ArenaConfig
    name: str
    seed: int
    lr: float
    budget: int
    prompts: cfg.PromptsConfig
    """What it is judged on."""
    moments: tuple[float, ...]
    folder: Path
    guided: bool

    @property
    def entry(self) -> cfg.ArenaEntry:
        """What is the entry's own."""
        return self.config.entries[self.name]

    @property
    def result(self) -> Path:
        """The file of its snapshots."""
        return self.folder / "cell.json"


def run(plan: Plan) -> None:
    """Train and judge; what was finished before is kept, and a failure is a result, too."""
    if plan.result.is_file():
        return
    try:
        snapshots_ = [asdict(one) for one in _snapshots(plan)]
        write_json(plan.result, {"lr": plan.lr, "snapshots": snapshots_})
    except Exception as error:  # the other cells go on, and the page says why this one did not
        write_json(plan.result, {"lr": plan.lr, "error": f"{type(error).__name__}: {error}", "snapshots": []})


def asdict(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as JSON has it."""
    return dict(snapshot._asdict())


def _snapshots(plan: Plan) -> list[Snapshot]:
    cost, seconds = (0, 0.0)
    if plan.entry.build is not None:
        cost, seconds = make_pool(plan)
        _make_records(plan)
    settings = _training(plan, 1)
    each = online.cost(settings) if settings.online else offline.cost(settings)
    updates = settings.online.updates if settings.online else 1
    stages = max(1, round(1 / min(plan.moments)))
    steps = max(1, round((plan.budget - cost) / each / stages)) * updates * stages  # `each` is a whole round's
    settings = _training(plan, steps, save_every=steps // stages)
    (online.run if settings.online else offline.run)(settings)
    lines = [json.loads(line) for line in (plan.folder / "train/metrics.jsonl").read_text().splitlines()]
    found = []
    wanted = {round(share * stages) * (steps // stages) for share in plan.moments}
    for step, lora in snapshots(plan.folder / "train").items():
        if step not in wanted:
            continue
        done = [line for line in lines if line["step"] <= step]
        used = cost + round(sum(line["evaluations"] for line in done))
        spent = seconds + sum(line["cpu"] for line in done)
        found.append(judged(plan, lora, step, used, spent, last=step == steps))
    return found


# --- the pool of offline methods -----------------------------------------------------------------------------------


def _pool(plan: Plan) -> Path:
    return Path(plan.config.dir) / f"pool-{plan.seed}-{plan.budget}"


def make_pool(plan: Plan) -> tuple[int, float]:
    """Sample and score what the offline entries of a seed share; network evaluations and processor seconds it took."""
    config, folder = plan.config, _pool(plan)
    rows = 2 if config.pool.guidance != 1.0 else 1
    per_prompt = config.candidates * config.pool.steps * rows
    prompts = read_prompts(config.pool_prompts, plan.seed)
    wanted = min(len(prompts), int(plan.budget * config.pool_share / per_prompt))
    done = folder / "cost.json"
    if done.is_file():
        known = json.loads(done.read_text())
        return known["evaluations"], known["seconds"]
    begun = time.process_time()
    order = np.random.default_rng(plan.seed).permutation(len(prompts))[:wanted]
    folder.mkdir(parents=True, exist_ok=True)
    store.write(folder / "prompts.jsonl", [prompts[n] for n in order])
    made = generate.run(
        cfg.GenerateConfig(
            model=config.model.model_copy(update={"lora": None}),
            prompts=cfg.PromptsConfig(source=str(folder / "prompts.jsonl")),
            candidates=config.candidates,
            sampling=config.pool,
            seed=plan.seed,
            out=str(folder),
        )
    )
    score.run(cfg.ScoreConfig(records=str(made), out=str(folder / "scored.jsonl"), scorers=config.scorers))
    cost = {"evaluations": wanted * per_prompt, "seconds": time.process_time() - begun}
    write_json(done, cost)
    return cost["evaluations"], cost["seconds"]


def _records(plan: Plan) -> Path:
    return _pool(plan) / f"{plan.name}.jsonl"


def _make_records(plan: Plan) -> None:
    """What an entry trains on: the pool by its rules, labels exchanged where the entry says so."""
    entry, pool, out = plan.entry, _pool(plan), _records(plan)
    if out.is_file():
        return
    built = pool / f"{plan.name}-built.jsonl"
    rules = {"reward": plan.config.reward, "page": False, **(entry.build or {})}
    build.run(cfg.BuildConfig.model_validate({"records": str(pool / "scored.jsonl"), "out": str(built), **rules}))
    records = list(store.read(built))
    if entry.best_only:
        records = [best(record) for record in records]
    rng = np.random.default_rng([plan.seed, 7])
    flipped = rng.random(len(records)) < entry.flip
    store.write(out, [exchanged(r) if turned else r for r, turned in zip(records, flipped, strict=True)])


def exchanged(record: Record) -> Record:
    """A record whose best and worst candidates have each other's reward: what a wrong annotator would say."""
    rewards = [level(candidate.labels["reward"]) for candidate in record.candidates]
    order = sorted(range(len(rewards)), key=lambda k: rewards[k])
    swapped = {order[0]: rewards[order[-1]], order[-1]: rewards[order[0]]}
    candidates = [
        c.model_copy(update={"labels": {**c.labels, "reward": swapped.get(k, rewards[k])}})
        for k, c in enumerate(record.candidates)
    ]
    return record.model_copy(update={"candidates": candidates})


# --- training and judging ------------------------------------------------------------------------------------------


def _training(plan: Plan, steps: int, save_every: int = 0) -> cfg.TrainConfig:
    """The config of the cell's run, as a user could have written it."""
    config, entry = plan.config, plan.entry
    rounds = None
    if entry.online is not None:
        shared = config.rounds.model_dump(exclude_unset=True)
        rounds = {**shared, **entry.online, "scorers": config.scorers, "reward": config.reward}
    updates = (rounds or {}).get("updates", 1)
    return cfg.TrainConfig.model_validate(
        {
            "model": config.model,
            "data": {"records": str(_records(plan))} if entry.build is not None else None,
            "online": rounds,
            "method": entry.method,
            "optim": {**config.optim, "lr": plan.lr},
            "run": {
                "dir": str(plan.folder / "train"),
                "steps": max(steps, updates),
                "batch": entry.batch,
                "precision": config.precision,
                "seed": plan.seed,
                "save_every": save_every,
                "snapshots": True,
                "ema": entry.ema,
                "resume": "latest",
            },
        }
    )


def judged(plan: Plan, lora: Path | None, updates: int, evaluations: int, seconds: float, *, last: bool) -> Snapshot:
    """A snapshot of a run, or the base, on the prompts it is judged on."""
    how = plan.config.evaluate
    family = models.load_model(
        plan.config.model.model_copy(update={"lora": None, "adapter": str(lora) if lora else None})
    )
    prompts = read_prompts(plan.prompts, how.seed)
    root = Path(plan.prompts.source).parent
    specs = score.by_label([how.judge, *how.panel])
    scorers = score.load_scorers(specs)
    sampling = make_sampling(how.sampling)
    found = held_out.judge(family, prompts, sampling, how.sampling.batch, how.seed, scorers, root)  # type: ignore[arg-type]
    outcomes: dict[str, Any] = dict(found.outcomes)
    if last and plan.guided:
        guided = make_sampling(how.guided)
        main = next(iter(specs))
        only = {main: scorers[main]}
        judged_ = held_out.judge(family, prompts, guided, how.guided.batch, how.seed, only, root)  # type: ignore[arg-type]
        outcomes["guided"] = judged_.outcomes[main]
    kl = 0.0 if lora is None else divergence(family, found.samples[:KL_SAMPLES], prompts[:KL_SAMPLES])
    return Snapshot(updates, evaluations, seconds, outcomes, kl, diversity(found.samples, prompts))


def diversity(samples: Tensor, prompts: list[Record]) -> float:
    """Mean root mean square difference between two pictures of one prompt."""
    by_prompt: dict[str, list[int]] = {}
    for row, record in enumerate(prompts):
        by_prompt.setdefault(str(record.prompt), []).append(row)
    distances = []
    for rows in by_prompt.values():
        flat = samples[rows].flatten(1)
        if len(rows) > 1:
            distances.append((torch.pdist(flat) / flat.shape[1] ** 0.5).mean())
    return float(torch.stack(distances).mean()) if distances else 0.0


@torch.no_grad()
def divergence(family: Any, samples: Tensor, prompts: list[Record]) -> float:
    """KL of the model's sampling process from the base's, in nats per sample, both as the stochastic flow of Flow-GRPO.

    The steps of both are Gaussians of one deviation ``g sqrt(d)`` whose means differ by
    ``d (1 + a^2 / 2) (v - v_base)`` with ``g^2 = a^2 s / (1 - s)``, a = 0.7, d = 1 / 10, so the path measures are
    ``sum d (1 + a^2 / 2)^2 (1 - s) / (2 a^2 s) |v - v_base|^2`` apart, here with states noised from the model's own
    samples. The base is the network with its LoRA off.
    """
    x0 = family.latents(*family.encode_media(samples.to(family.device) * 2 - 1))
    cond = family.encode_prompt([str(record.prompt) for record in prompts])
    total = torch.zeros(len(x0))
    steps = 10
    for index in range(steps):
        s = (index + 0.5) / steps
        noise = torch.randn(x0.shape, generator=keyed(x0.device, index))
        x_t = (1 - s) * x0 + s * noise
        t = torch.full((len(x0),), s)
        moved = family.predict(family.net, x_t, t, cond)
        family.net.disable_adapters()
        base = family.predict(family.net, x_t, t, cond)
        family.net.enable_adapters()
        weight = (1 + NOISE_LEVEL**2 / 2) ** 2 * (1 - s) / (2 * NOISE_LEVEL**2 * s) / steps
        total += weight * (moved - base).square().flatten(1).sum(1)
    return float(total.mean())


def read(path: Path) -> tuple[list[Snapshot], str, float]:
    """Snapshots, the reason of a failure or "", and the learning rate."""
    found: Mapping[str, Any] = json.loads(path.read_text())
    return [Snapshot(**one) for one in found["snapshots"]], found.get("error", ""), found["lr"]
