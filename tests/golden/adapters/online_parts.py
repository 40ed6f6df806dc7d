"""What surrounds the online losses: training times, advantages, decays, solvers, and AWM's EDM ablation."""

from typing import Any

import torch
from torch import Tensor

from diffalign import anchors, credit, edm, samplers, timesteps
from diffalign import config as cfg
from diffalign.schedule import Rectified
from diffalign.train.job import ANCHORS

from .common import Given, adapter


@adapter()
def awm_edm(params: Given, inputs: Given) -> dict[str, Any]:
    """Clean and noisy score matching: the sum over elements, over the batch."""
    grid = edm.karras_grid(params("num_steps"), params("sigma_min"), params("sigma_max"), params("rho"))
    leaf = inputs.tensor("model_pred").requires_grad_()
    y, sigma, noise = (inputs.tensor(name) for name in ("clean", "sigma", "noise"))
    data, below = params("sigma_data"), edm.level_below(sigma, grid)
    if params("kind", among=("clean_dsm", "noisy_dsm")) == "clean_dsm":
        matching = edm.clean(y, sigma, noise, sigma_data=data)
    else:
        matching = edm.noisy(y, sigma, below, noise, inputs.tensor("noise_st"), sigma_data=data)
    elements = matching.loss(leaf)
    value = elements.sum() / len(y)
    made = {"loss": value, "per_element": elements, "net_input": matching.x, "sigma_s": below}
    return {**made, "grad_model_pred": torch.autograd.grad(value, leaf)[0]}


@adapter(requires=("t",))
def awm_timesteps(params: Given, inputs: Given) -> dict[str, Any]:
    """Training times of a micro-batch, flattened by time and then sample."""
    kinds = ("discrete", "discrete_wo_init", "discrete_with_init", "uniform", "logit_normal")
    kind, count, size = params("time_type", among=kinds), params("num_t"), params("micro_batch")
    levels = int(params("num_steps") * params("timestep_fraction"))
    u, line, grid = inputs.tensor("u"), Rectified(shift=params("time_shift", 3.0)), None
    if "scheduler_timesteps" in inputs:
        grid = inputs.tensor("scheduler_timesteps") / line.scale
    if kind == "uniform":
        keys = inputs.tensor("perm_key") if "perm_key" in inputs else inputs.tensor("perm").argsort(0).double()
        return {"t": timesteps.uniform(u, keys, line.shifted).flatten()}
    if kind == "logit_normal":
        order = inputs.tensor("perm").long() if "perm" in inputs else inputs.tensor("perm_key").argsort()
        return {"t": timesteps.logit_normal(u, order, line.shifted).repeat_interleave(size)}
    index = timesteps.discrete(kind, count, levels, u)
    lower, upper = timesteps.strata(kind, count, levels)
    assert grid is not None
    made = {"t_indices": index, "lower_bounds": lower, "upper_bounds": upper}
    return {**made, "t": grid[index].repeat_interleave(size)}


@adapter(requires=())
def advantages(params: Given, inputs: Given) -> dict[str, Any]:
    """From rewards to advantages."""
    kinds = ("group", "buffered", "contiguous_group", "batch", "dpo", "optimality_probability")
    kind = params("kind", among=kinds)
    if kind == "optimality_probability":
        modes = ("all", "positive_only", "negative_only", "one_only", "binary")
        mode, bound = params("adv_mode", "all", among=modes), params("adv_clip_max")
        return {"r": credit.optimality_probability(inputs.tensor("advantages"), clip_max=bound, kind=mode)}
    if kind == "buffered":
        tracker = credit.Buffered(
            params("buffer_size"), params("min_count"), ddof=params("ddof", 0), eps=params("eps", 1e-6)
        )
        calls = [Given(call) for call in inputs("calls")]
        made = [tracker.update(call("prompts"), call.tensor("rewards")) for call in calls]
        return {"advantages": [advantages.tolist() for advantages in made]}
    rewards = inputs.tensor("rewards")
    groups = inputs("prompts", None) or [0] * len(rewards)
    if kind == "contiguous_group":
        groups = [index // params("group_size") for index in range(len(rewards))]
    size = {"avg_group_size": len(groups) / len(set(groups))}
    if kind == "dpo":
        for name in ("eps", "ddof", "global_std"):
            params(name, None)
        return {**size, "advantages": _best_and_worst(rewards, groups)}
    groups = [0] * len(rewards) if kind == "batch" else groups
    spread = "all" if params("global_std", False, among=(True, False)) else "group"
    options = {"ddof": params("ddof", 0), "eps": params("eps")}
    return {**size, "advantages": credit.standardised(rewards, groups, spread=spread, **options)}


def _best_and_worst(rewards: Tensor, groups: list[Any]) -> Tensor:
    """(N,) +1 for the best of each group, -1 for the worst."""
    out = torch.zeros_like(rewards)
    for name in dict.fromkeys(groups):
        rows = torch.tensor([row for row, other in enumerate(groups) if other == name])
        ((first, second),) = credit.pairs(rewards[rows][None], "best_worst")[0].tolist()
        if len(rows) > 1:
            out[rows[first]], out[rows[second]] = 1, -1
    return out


OLD_POLICY = {0: cfg.AnchorConfig(), 1: ANCHORS["behaviour"], 2: cfg.AnchorConfig(rate=0.0075, cap=0.999, start=75)}
"""DiffusionNFT's decay types: 0 copies, 1 for GenEval and human-preference rewards, 2 for OCR."""


@adapter(requires=("decay",))
def ema_schedules(params: Given, inputs: Given) -> dict[str, Any]:
    """Decays by the number of updates."""
    kind, counts = params("kind", among=("nft_decay", "awm_linear", "eval_ema")), inputs("steps")
    if kind == "nft_decay":
        how = OLD_POLICY[params("decay_type", among=(0, 1, 2))]
        return {"decay": [anchors.linear_decay(n, how.rate, how.cap, how.start) for n in counts]}
    if kind == "awm_linear":
        return {"decay": [anchors.linear_decay(n, params("rate"), params("cap")) for n in counts]}
    limit, interval = params("decay"), params("update_interval")
    decays = [anchors.average_decay(n, limit) for n in counts]
    return {"decay": decays, "updates": [anchors.is_due(n, interval) for n in counts]}


@adapter(requires=("latents",))
def flow_solvers(params: Given, inputs: Given) -> dict[str, Any]:
    """Deterministic and stochastic solvers on a linear velocity."""
    params("velocity", among=("v = a*x + b*sigma + c", "v = a*x + b*t + c"))
    a, b, c = (params(name) for name in "abc")
    solver = params("solver", among=("dpm1", "dpm2", "ddim", "sa_solver"))
    grid = inputs.tensor("t" if "t" in inputs else "sigmas")
    assert params("num_steps", len(grid) - 1) == len(grid) - 1
    states: list[Tensor] = []
    options: dict[str, Any] = {}
    run_solver = samplers.SAMPLERS[solver]
    if solver == "sa_solver":
        params("mode", among=("PEC",))
        run_solver = samplers.sa_solver
        low, high = params("tau_interval", (0.0, 1.0))
        options = {"tau": params("tau"), "interval": (low, high)}
        options |= {name: params(name) for name in ("predictor_order", "corrector_order")}
        options["noise"] = iter(inputs.tensor("noises")[1:]) if "noises" in inputs else None
    latents = run_solver(lambda x, t: a * x + b * t + c, inputs.tensor("z"), grid, states=states, **options)
    return {"latents": latents, "trajectory": torch.stack(states)}
