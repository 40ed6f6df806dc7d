"""One cell of an arena: an entry with a seed and a learning rate, trained to a budget and judged on the way."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.arena import pool
from diffalign.arena.judge import judged
from diffalign.arena.plan import Plan
from diffalign.arena.scores import Snapshot
from diffalign.errors import UserError
from diffalign.files import write_json
from diffalign.train import start
from diffalign.train.run import snapshots


def run(plan: Plan) -> None:
    """Train and judge; what was finished before is kept, and a failure is written down beside it."""
    if plan.result.is_file():
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    plan.failure.unlink(missing_ok=True)
    try:
        write(plan.result, plan.lr, _snapshots(plan))
    except Exception:  # the other cells go on, and the page says why this one did not
        plan.failure.write_text(traceback.format_exc(), encoding="utf-8")


def _snapshots(plan: Plan) -> list[Snapshot]:
    cost, seconds = (0, 0.0)
    if plan.entry.build is not None:
        cost, seconds = pool.make(plan)
        pool.make_records(plan)
    each = start.cost(plan.training(1))
    stages = round(1 / plan.moments[0])
    per_stage = round((plan.budget - cost) / each.evaluations / stages) * each.updates
    if not per_stage:
        raise UserError(f"budget: {plan.budget:,} evaluations are too few to judge after {plan.moments[0]:g} of them")
    start.run(plan.training(per_stage * stages, save_every=per_stage))
    lines = [json.loads(line) for line in (plan.folder / "train/metrics.jsonl").read_text().splitlines()]
    wanted = {round(share * stages) * per_stage for share in plan.moments}
    found = []
    for step, lora in snapshots(plan.folder / "train").items():
        if step not in wanted:
            continue
        done = [line for line in lines if line["step"] <= step]
        used = cost + round(sum(line["evaluations"] for line in done))
        spent = seconds + sum(line["cpu"] for line in done)
        found.append(judged(plan, lora, step, used, spent, last=step == max(wanted)))
    if len(found) < len(wanted):
        raise UserError(f"judged {len(found)} times, expected {len(wanted)}: the run ended early")
    return found


def write(path: Path, lr: float, found: list[Snapshot]) -> None:
    """A result."""
    write_json(path, {"lr": lr, "snapshots": [dict(one._asdict()) for one in found]})


def read(path: Path) -> tuple[list[Snapshot], float]:
    """Snapshots of a result, and the learning rate."""
    found: Mapping[str, Any] = json.loads(path.read_text())
    return [Snapshot(**one) for one in found["snapshots"]], found["lr"]
