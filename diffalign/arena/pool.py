"""What the offline entries of an arena train on: samples of the base, scored once per seed, records by their rules."""

from __future__ import annotations

import json
import time

import numpy as np

from diffalign import build, generate, score
from diffalign import config as cfg
from diffalign import records as store
from diffalign.arena.plan import Plan
from diffalign.files import write_json
from diffalign.prompts import read_prompts
from diffalign.records import Record
from diffalign.rewards import level
from diffalign.train.experts import best


def make(plan: Plan) -> tuple[int, float]:
    """Sample and score the pool, unless it is there; network evaluations and processor seconds it took."""
    config, folder = plan.config, plan.pool
    done = folder / "cost.json"
    if done.is_file():
        known = json.loads(done.read_text())
        return known["evaluations"], known["seconds"]
    begun = time.process_time()
    rows = 2 if config.pool.guidance != 1.0 else 1
    per_prompt = config.candidates * config.pool.steps * rows
    prompts = read_prompts(config.pool_prompts, plan.seed)
    wanted = min(len(prompts), int(plan.budget * config.pool_share / per_prompt))
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


def make_records(plan: Plan) -> None:
    """What an entry trains on: the pool by its rules, rewards exchanged where the entry says so."""
    entry = plan.entry
    rules = plan.building()
    build.run(rules)
    records = list(store.read(rules.out))
    if entry.best_only:
        records = [best(record) for record in records]
    rng = np.random.default_rng([plan.seed, 7])
    flipped = rng.random(len(records)) < entry.flip
    store.write(plan.records, [exchanged(r) if turned else r for r, turned in zip(records, flipped, strict=True)])


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
