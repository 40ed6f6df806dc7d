"""A method of two terms on a linear network in float64, to be trained by ``Update`` alone or on several ranks.

As a program, ``python linear.py OUT`` trains as the rank that the environment names and writes the result to OUT.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.train.step import loss_step
from diffalign.train.update import Update
from diffalign.types import Batch, LogProbs, Method, Term

WIDTH = 5


def _estimate(family, weights, batch: Batch, draw, roles, autocast, *, power: float, masked: bool) -> LogProbs:
    """Log-probs from a linear layer; a masked term does not count records whose ``skip`` is set."""
    value = family(batch.x0)
    policy = -value.abs().pow(power)
    present = 1 - batch.cond["skip"] if masked else None
    reference = -0.3 * batch.x0.sum(-1, keepdim=True).square()
    return LogProbs({"policy": policy, "reference": reference}, torch.ones_like(policy), present=present)


def _term(power: float, beta: float, weight: float, masked: bool) -> Term:
    def estimate(*args: Any) -> LogProbs:
        return _estimate(*args, power=power, masked=masked)

    return Term(lambda *args: None, estimate, "sigmoid", weight, {"beta": beta})


METHOD = Method("two-terms", "none", _term(2.0, 0.5, 1.0, False), extra=(_term(1.5, 2.0, 0.3, True),))


def network() -> nn.Module:
    net = nn.Linear(WIDTH, 1, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.linspace(-1, 1, WIDTH, dtype=torch.float64)[None])
        net.bias.fill_(0.1)
    return net


def data(n: int, seed: int = 0, rewards: list[float] | None = None, skip: list[float] | None = None) -> Batch:
    """n pairs; reward 0 is a tie, otherwise the first candidate's lead."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, 2, WIDTH, generator=generator, dtype=torch.float64)
    first = torch.tensor(rewards if rewards is not None else [float(i % 3 - 1) for i in range(n)])
    skipped = torch.tensor(skip if skip is not None else [float(i % 4 == 1) for i in range(n)], dtype=torch.float64)
    return Batch(x0, {"skip": skipped[:, None]}, {"reward": torch.stack([first, 0 * first], 1)})


def make_update(net: nn.Module, reduce: Callable[[Tensor], Tensor], clip: float | None = None) -> Update:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return Update(list(net.parameters()), optimizer, scheduler, reduce, clip)


def accumulate(update: Update, net: nn.Module, parts: list[Batch]) -> dict[str, float]:
    """All micro-steps of one step."""
    for part in parts:
        update.add(loss_step(METHOD, net, net, part, torch.Generator()), alone=len(parts) == 1)  # type: ignore[arg-type]
    return update.collect()


def train(rank: int, world: int, reduce: Callable[[Tensor], Tensor], steps: int = 3, micros: int = 2) -> dict[str, Any]:
    """Steps over 24 pairs, cut between ranks and micro-steps; in the first, one rank sees ties alone."""
    net = network()
    update = make_update(net, reduce, clip=0.5)
    everything = data(24, rewards=[1.0, -1.0, 0.0, 0.0, -1.0, 1.0, 0.0, 0.0, *[float(i % 3 - 1) for i in range(16)]])
    size = 24 // (steps * micros * world)
    metrics = []
    for step in range(steps):
        starts = [((step * micros + micro) * world + rank) * size for micro in range(micros)]
        metrics.append(accumulate(update, net, [everything.rows(slice(s, s + size)) for s in starts]))
        update.apply()
    return {"parameters": [p.tolist() for p in net.parameters()], "metrics": metrics}


def main(out: Path) -> None:
    from diffalign.train.run import Run

    run = Run(out.parent, torch.device("cpu"), "fp32", 0, 1)
    result = train(run.rank, run.world, run.sum_over_ranks)
    result["alone"] = train(run.rank, run.world, run.sum_over_ranks, micros=1)
    result["run"] = [run.rank, run.world, run.is_main]
    result["sum"] = run.sum_over_ranks(torch.tensor([1.0 + run.rank, 10.0])).tolist()
    out.write_text(json.dumps(result), encoding="utf-8")
    run.accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)  # now and then torch aborts in its static destructors, after everything is written


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
