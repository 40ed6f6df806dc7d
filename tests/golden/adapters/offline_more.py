"""Offline diffusion methods with more than a winner: soft labels and inversion, lists, frames, conditions, fakes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign import draws, rewards
from diffalign.likelihood import denoising_error
from diffalign.objectives import diffusion, ranked
from diffalign.objectives.pair import oriented_margin
from diffalign.records import Candidate, Record
from diffalign.schedule import Discrete, Rectified
from diffalign.types import Batch, LogProbs

from .common import Given, adapter, run, split, total
from .offline import RAW, WL, conventions, draw_of, first_wins, gradients, log_probs, pair_errors, table


@dataclass
class _Toy:
    """A family whose prediction is ``k1 x + k2 cos(timestep / 1000)``."""

    schedule: Discrete
    k1: float
    k2: float

    @contextmanager
    def use(self, role: str) -> Iterator[None]:
        assert role == "policy"
        yield

    def predict(self, net: None, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        wave = torch.cos(self.schedule.native(t).double() / 1000)
        return self.k1 * x_t + self.k2 * wave.reshape(-1, *[1] * (x_t.ndim - 1))


def _inverted(params: Given, inputs: Given) -> tuple[Tensor, dict[str, Any]]:
    """The target (B, 2, ...) of the released inversion by a toy network, and what is expected of it."""
    params("toy_network", None)
    params("initial_alpha_bar", None, among=(None, "table[0] when the source level is negative"))
    params("renoise_iterations", 1, among=(1,))
    params("renoise_average", True, among=(True,))
    family = _Toy(table(params, "epsilon"), params("k1"), params("k2"))
    steps, index, grid, used = (params(n) for n in ("num_inversion_steps", "timestep", "grid", "grid_used"))
    assert len(grid) == steps
    assert used == [level for level in grid if level < index]
    x0 = inputs.pair("latents", WL)
    t = family.schedule.unit(torch.tensor(index)).expand(x0.shape[:2])
    draw = draws.invert(family, family, Batch(x0, {}, {}), t, steps, released=True)  # type: ignore[arg-type]
    levels = family.schedule.alphas_cumprod
    made = {
        "x_t": draw.x_t.transpose(0, 1).flatten(0, 1),
        "target": draw.target.transpose(0, 1).flatten(0, 1),
        "alpha_bar_t": levels[index],
        "alpha_bar_grid_last": levels[used[-1] if used else 0],
    }
    return draw.target, made


@adapter("smoothed")
def smpo(params: Given, inputs: Given) -> dict[str, Any]:
    """Pairs in raw order with scores, or winners stacked on losers with the winner's probability and an inversion."""
    conventions(params)
    beta, gamma = params("beta"), params("gamma")
    params("smoothing", None)
    if "score_0" in inputs:
        leaf, target, made = inputs.pair("model_pred", RAW), inputs.pair("target", RAW), {}
        reference, reward = inputs.pair("ref_pred", RAW), inputs.pair("score", RAW)
        soft: dict[str, Any] = {"score_min": params("score_min"), "score_max": params("score_max")}
        lead = diffusion.lead(reward, soft["score_min"], soft["score_max"])
    else:
        target, made = _inverted(params, inputs)
        leaf, reference = (
            inputs.tensor(n).unflatten(0, (2, -1)).transpose(0, 1).contiguous() for n in ("model_pred", "ref_pred")
        )
        p = torch.full((len(leaf),), params("p_winner"), dtype=torch.float64)
        reward, soft, lead = torch.stack([p, 1 - p], 1), {"kind": "probability"}, 2 * p - 1
    leaf.requires_grad_()
    errors = {"policy": denoising_error(leaf, target), "reference": denoising_error(reference, target)}
    lp, labels = log_probs(errors, half=params("half", among=(True, False))), {"reward": reward}
    (loss,) = run("smoothed", lp, labels, beta=beta, gamma=gamma, **soft)
    (gradient,) = torch.autograd.grad(total(loss), leaf)
    stacked = {"model_pred": gradient.transpose(0, 1).flatten(0, 1)}
    return {
        **made,
        "loss": total(loss),
        "grad_model_pred": stacked if made else split("model_pred", gradient, RAW),
        "p_winner": (1 + lead.abs()) / 2,
        "label_0": reward[:, 0] > reward[:, 1],
        "coefficient": gamma * lead.abs(),
        "inside_term": beta * gamma * lead.abs() * oriented_margin(lp, labels)[0],
    }


def _aggregated(inputs: Given) -> Tensor:
    """phi (B, K): given, or wins counted over the scores (B, n, K) of n scorers."""
    if "phi" in inputs:
        return inputs.tensor("phi")
    rows = []
    for scores in inputs("reward_scores"):
        names = {f"scorer_{n}": 1.0 for n in range(len(scores))}
        candidates = [
            Candidate(text="", labels=dict(zip(names, column, strict=True))) for column in zip(*scores, strict=True)
        ]
        rows.append(rewards.combine(Record(id="0", prompt="", candidates=candidates), names, "wins"))
    return torch.tensor(rows, dtype=torch.float64)


@adapter("dcg")
def rankdpo(params: Given, inputs: Given) -> dict[str, Any]:
    params("err_reduction", among=("mean",))
    params("log_base", "e", among=("e",))
    params("pair_reduction", "sum", among=("sum",))
    params("batch_reduction", "mean", among=("mean",))
    params("tie_rule", None)
    params("noise", None)
    schedule = (
        Rectified() if params("prediction_type", among=("epsilon", "flow")) == "flow" else table(params, "epsilon")
    )
    leaf = inputs.tensor("model_pred").requires_grad_()
    assert leaf.shape[1] == params("k", leaf.shape[1])
    if "latents" in inputs:
        target = schedule.target(inputs.tensor("latents"), inputs.tensor("noise"), torch.zeros(leaf.shape[:2]))
    else:
        target = inputs.tensor("target")
    errors = {"policy": denoising_error(leaf, target), "reference": denoising_error(inputs.tensor("ref_pred"), target)}
    lp, phi = log_probs(errors, half=params("half", among=(True, False))), _aggregated(inputs)
    (loss,) = run("dcg", lp, {"reward": phi}, beta=params("beta"))
    gains = ranked.dcg_gains(phi, phi, lp.exists)
    return {
        "loss": total(loss),
        "loss_per_prompt": loss.value,
        "grad_model_pred": {"model_pred": torch.autograd.grad(total(loss), leaf)[0]},
        "score": diffusion.errors(lp) - diffusion.errors(lp, "reference"),
        "tau": gains.rank,
        "gain": gains.gain,
        "discount": gains.discount,
        "pair_weight": gains.pair,
        "phi": phi,
        "target": target,
    }


@adapter("dense")
def densedpo(params: Given, inputs: Given) -> dict[str, Any]:
    """Frames are units; the label of a segment is that of its frames."""
    params("err_reduction", among=("mean",))
    params("prediction_type", among=("flow",))
    params("batch_reduction", None)
    params("label_meaning", None)
    x0, noise, segment = (
        inputs.pair("latents", RAW),
        inputs.pair("noise", RAW),
        torch.tensor(inputs("segment_of_frame")),
    )
    target = Rectified().target(x0, noise, torch.zeros(x0.shape[:2]))
    leaf, errors = pair_errors(inputs, target, RAW, keep=(-3,))
    lp = log_probs(errors, half=params("half", among=(True, False)))
    label = inputs.tensor("segment_labels")[:, segment]
    labels = {"reward": torch.stack([label, -label], 1), "segment": segment.expand(len(leaf), 2, -1)}
    reduction, beta = params("segment_reduction", among=("token_mean", "segment_sum", "per_segment")), params("beta")
    (loss,) = run("dense", lp, labels, beta=beta, segment_reduction=reduction)
    return {
        "loss": total(loss),
        "grad_model_pred": gradients(total(loss), leaf, RAW),
        **split("score", errors["policy"] - errors["reference"], RAW),
        "inside_term": beta * diffusion.dense_margin(lp, labels, reduction),
        "pairs_used": loss.weight,
    }


@adapter("condition", "sft_all")
def condition_po(params: Given, inputs: Given) -> dict[str, Any]:
    """Two conditions on one noisy image, and the pre-training loss on a draw of its own."""
    params("err_reduction", among=("mean",))
    params("mask", None)
    smoothing = params("smoothing", 0.1)
    if params("variant", among=("smoothed", "plain")) == "plain":
        smoothing = 0.0
    timesteps = torch.tensor(inputs("timesteps"))
    _, target, _ = draw_of(params, inputs, WL)
    leaf, errors = pair_errors(inputs, target, WL)
    t = Discrete.scaled_linear().unit(timesteps)[:, None, None].expand(-1, 2, 1)
    lp, labels = log_probs(errors, half=params("half", among=(True, False)), extra={"t": t}), first_wins(len(leaf))
    beta = params("beta")
    (loss,) = run("condition", lp, labels, beta=beta, margin=params("margin"), smoothing=smoothing)
    own = inputs.tensor("model_pred_sft").requires_grad_()
    plain = log_probs({"policy": denoising_error(own[:, None], inputs.tensor("target_sft")[:, None])})
    pretrain = total(*run("sft_all", plain, {}))
    value = total(loss) + params("grad_scale") * pretrain
    contrast = diffusion.contrast(lp, labels, beta)
    return {
        "loss": value,
        "loss_preference": total(loss),
        "loss_pretrain": pretrain,
        "grad_model_pred": {
            **gradients(total(loss), leaf, WL),
            "model_pred_sft": torch.autograd.grad(value, own)[0],
        },
        "diff_model": contrast.policy,
        "diff_ref": contrast.reference,
        "weight": contrast.pull,
        "target": target[:, 0],
    }


@adapter("ddo")
def ddo(params: Given, inputs: Given) -> dict[str, Any]:
    """Real and fake samples are unpaired: one (N, 1, 1) batch of both."""
    sides, leaves = ("real", "fake"), {}
    params("likelihood", None, among=(None, "exact sequence log-probability"))
    exact = "model_logp_real" in inputs
    reduction = None if exact else params("err_reduction", among=("sum", "mean"))
    by_role: dict[str, list[Tensor]] = {"policy": [], "reference": []}
    for side in sides:
        for role, name in (("policy", "model"), ("reference", "ref")):
            given = inputs.tensor(f"{name}_logp_{side}" if exact else f"{name}_pred_{side}")
            if role == "policy":
                leaves[f"{name}_logp_{side}" if exact else f"{name}_pred_{side}"] = given.requires_grad_()
            if exact:
                by_role[role].append(given[:, None, None])
                continue
            target = inputs.tensor(f"target_{side}")
            weight = inputs.tensor(f"weight_{side}") if f"weight_{side}" in inputs else torch.ones(len(given))
            scale = weight * (given[0].numel() if reduction == "sum" else 1)
            by_role[role].append(-scale[:, None, None] * denoising_error(given[:, None], target[:, None]))
    real = torch.cat([torch.full_like(part, 1.0 - index) for index, part in enumerate(by_role["reference"])])
    joined = {role: torch.cat(halves) for role, halves in by_role.items()}
    lp, labels = LogProbs(joined, torch.ones_like(real)), {"desirable": real[..., 0]}
    beta, divide = params("beta"), params("divide_by_max_alpha_1", False, among=(True, False))
    value = total(*run("ddo", lp, labels, alpha=params("alpha"), beta=beta, divide_by_max_alpha=divide))
    plain = run("ddo", lp, labels, alpha=1.0, beta=beta)
    ratio = lp.ratio()[:, 0]
    return {
        "loss": value,
        **{f"loss_{side}": part.reduce() for side, part in zip(sides, plain, strict=True)},
        "grad_model_pred": dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True)),
        **{f"log_ratio_{side}": ratio[real[:, 0, 0] == 1 - index] for index, side in enumerate(sides)},
    }
