"""Online and simulator-feedback methods: rows of a case become records with one candidate and one unit."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffalign import credit, samplers
from diffalign.likelihood import denoising_error
from diffalign.objectives.matching import branch_losses, branch_sizes
from diffalign.objectives.policy_gradient import advantage
from diffalign.schedule import Rectified
from diffalign.transitions import FLOW_STEPS, Step, ddim
from diffalign.types import LogProbs

from .common import Given, adapter, run, shaped, total


def _network(inputs: Given, params: Given, stem: str, side: str = "") -> tuple[Tensor, dict[str, Tensor]]:
    """A prediction, and the raw outputs that it is made of by name; two branches are guided as in a forward."""
    if f"{stem}{side}" in inputs:
        names = (f"{stem}{side}",)
    else:
        names = tuple(f"{stem}_{branch}{side}" for branch in ("uncond", "cond"))
    leaves = {name: inputs.tensor(name).requires_grad_(stem == "model_pred") for name in names}
    guidance, frozen = params("guidance_scale", None), params("detach_uncond", False, among=(True, False))
    if len(leaves) == 1:
        return next(iter(leaves.values())), leaves
    n = len(next(iter(leaves.values())))
    rows = torch.arange(2 * n)
    empty, cond = ({"row": half} for half in rows.split(n))
    predict = samplers.guided(Stored(), torch.cat(list(leaves.values())), cond, empty, guidance, detach_uncond=frozen)
    return predict(torch.zeros_like(leaves[names[0]]), torch.tensor(0.5)), leaves


class Stored:
    """A family whose predictions are the rows that its conditions name of what plays the network."""

    def predict(self, net: Tensor, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return net[cond["row"]]

    def rescale(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        return guided


def _gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    rows = zip(leaves.items(), found, strict=True)
    return {f"grad_{name}": torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in rows}


def _ddim(params: Given, inputs: Given) -> partial[Step]:
    """A DDIM step between the levels of a case."""
    for name in ("timestep", "prev_timestep"):
        inputs(name, None)
    for name in ("num_inference_steps", "num_train_timesteps"):
        params(name, None)
    kind = params("prediction_type", among=("epsilon", "v_prediction", "sample"))
    ends = {"level": inputs.tensor("alpha_bar_t"), "following": inputs.tensor("alpha_bar_prev")}
    return partial(ddim, noise_level=params("eta"), parametrisation=kind, **ends)


def _flow(params: Given, inputs: Given) -> partial[Step]:
    """A step of a flow between the levels of a case."""
    for name in ("num_steps", "shift"):
        params(name, None)
    kind = params("sde_type", among=("flow_sde", "cps", "dance"))
    ends = {"level": inputs.tensor("sigma"), "following": inputs.tensor("sigma_next")}
    second = inputs("sigma_second", None)
    options = {"second": second} if kind == "flow_sde" else {}
    return partial(FLOW_STEPS[kind], noise_level=params("noise_level"), **ends, **options)


def _units(rows: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1)."""
    return rows[:, None, None]


def _step(params: Given, inputs: Given, transition: partial[Step]) -> dict[str, Any]:
    """One pure step: the loss is the sum of log-probs."""
    prediction, leaves = _network(inputs, params, "model_pred")
    step = transition(prediction, inputs.tensor("sample"))
    reached = step.sample(inputs.tensor("noise"))
    log_prob = step.log_prob(reached)
    value = log_prob.sum()
    return {
        "prev_mean": step.mean,
        "std": step.std,
        "transition_std": step.std,
        "diffusion_coef": step.diffusion,
        "next_sample": reached,
        "log_prob": log_prob,
        "loss": value,
        **_gradients(value, leaves),
    }


@adapter()
def ddim_logprob(params: Given, inputs: Given) -> dict[str, Any]:
    """The DDIM transition of DDPO and D3PO."""
    return _step(params, inputs, _ddim(params, inputs))


@adapter()
def flow_sde_step(params: Given, inputs: Given) -> dict[str, Any]:
    """The stochastic transitions of rectified flows."""
    return _step(params, inputs, _flow(params, inputs))


def _surrogate(
    params: Given, inputs: Given, transition: partial[Step], objective: str, **options: Any
) -> tuple[dict[str, Any], Tensor, dict[str, Tensor]]:
    """A clipped policy gradient on one stored transition: what is expected of it, the loss, and the leaves."""
    prediction, leaves = _network(inputs, params, "model_pred")
    x_t, reached = inputs.tensor("sample"), inputs.tensor("next_sample")
    step = transition(prediction, x_t)
    log_prob, old = step.log_prob(reached), inputs.tensor("old_log_prob")
    by_role, gap = {"policy": _units(log_prob), "behaviour": _units(old)}, {}
    if "old_prev_mean" in inputs:
        gap["behaviour"] = _units(step.gap(Step(inputs.tensor("old_prev_mean"), step.std, step.diffusion)))
    reference, _ = _network(inputs, params, "ref_pred") if "ref_pred" in inputs else (None, {})
    if reference is not None:
        before = transition(reference, x_t)
        gap["reference"] = _units(step.gap(before))
        by_role["reference"] = _units(before.log_prob(reached))
    extra = {"std": _units(step.std), "diffusion": _units(step.diffusion)}
    if "level" in transition.keywords and "sigma" in inputs:
        extra["dt"] = _units(transition.keywords["level"] - transition.keywords["following"])
    lp = LogProbs(by_role, torch.ones_like(by_role["policy"]), gap, extra=extra)
    labels = {"advantage": inputs.tensor("advantages")[:, None]}
    clip, bound = params("clip_range"), params("adv_clip_max")
    common = {"clip_low": clip, "clip_high": clip, "adv_clip_max": bound}
    policy = total(*run(objective, lp, labels, **common, **options))
    value, made, kl_beta = policy, {}, params("kl_beta", 0.0)
    if reference is not None:
        made["kl_loss"] = total(*run("gaussian_kl", lp, labels))
        value = policy + kl_beta * made["kl_loss"]
    assert reference is not None or not kl_beta
    ratio = (log_prob - old).exp()
    if objective == "guarded_policy_gradient":
        bias = gap["behaviour"][:, 0, 0]
        bias = bias.mean() if options["bias"] == "batch" else bias
        made["ratio_mean_bias"] = (bias / (2 * step.std.square())).expand_as(ratio)
        ratio = ((log_prob - old + made["ratio_mean_bias"]) * step.std).exp()
    made |= {
        "policy_loss": policy,
        "log_prob": log_prob,
        "ratio": ratio,
        "prev_mean": step.mean,
        "clipped_advantages": advantage(lp, labels, bound)[:, 0, 0],
        "clipfrac": ((ratio - 1).abs() > clip).double().mean(),
    }
    return made, value, leaves


@adapter("clipped_policy_gradient", requires=("loss",))
def ddpo(params: Given, inputs: Given) -> dict[str, Any]:
    """PPO's clip on DDIM transitions."""
    made, value, leaves = _surrogate(params, inputs, _ddim(params, inputs), "clipped_policy_gradient")
    return {**made, "loss": value, **_gradients(value, leaves)}


@adapter("clipped_policy_gradient", "gaussian_kl", requires=("loss",))
def flow_grpo(params: Given, inputs: Given) -> dict[str, Any]:
    """PPO's clip on flow transitions, with the Gaussian KL to the base."""
    made, value, leaves = _surrogate(params, inputs, _flow(params, inputs), "clipped_policy_gradient")
    return {**made, "loss": value, **_gradients(value, leaves)}


@adapter("guarded_policy_gradient", "gaussian_kl")
def grpo_guard(params: Given, inputs: Given) -> dict[str, Any]:
    """The regulated ratio; the released bias is that of the whole micro-batch."""
    options = {
        "bias": params("bias_reduction", among=("batch", "per_sample")),
        "divide_by_dt": params("divide_by_dt", among=(True, False)),
    }
    made, value, leaves = _surrogate(params, inputs, _flow(params, inputs), "guarded_policy_gradient", **options)
    return {**made, "loss": value, **_gradients(value, leaves)}


@adapter("clipped_policy_gradient")
def dance_grpo(params: Given, inputs: Given) -> dict[str, Any]:
    """PPO's clip on transitions of constant noise; the release divides by what the loop accumulates."""
    made, value, leaves = _surrogate(params, inputs, _flow(params, inputs), "clipped_policy_gradient")
    value = value / (params("gradient_accumulation_steps") * params("train_timesteps"))
    clean = Rectified().denoised(inputs.tensor("sample"), leaves["model_pred"], inputs.tensor("sigma"))
    return {**made, "loss": value, "pred_original": clean, **_gradients(value, leaves)}


@adapter("clipped_ratio", requires=("loss", "preference"))
def d3po(params: Given, inputs: Given) -> dict[str, Any]:
    """Pairs of DDIM transitions; ties count, as in the release."""
    transition = _ddim(params, inputs)
    made, leaves, sides = {}, {}, []
    for side in ("_0", "_1"):
        prediction, own = _network(inputs, params, "model_pred", side)
        reference, _ = _network(inputs, params, "ref_pred", side)
        x_t, reached = inputs.tensor(f"sample{side}"), inputs.tensor(f"next_sample{side}")
        now, before = (transition(p, x_t).log_prob(reached) for p in (prediction, reference))
        sides.append((now, before))
        leaves |= own
        made |= {f"log_prob{side}": now, f"ref_log_prob{side}": before}
    policy, reference = (torch.stack(rows, 1)[..., None] for rows in zip(*sides, strict=True))
    lp = LogProbs({"policy": policy, "reference": reference}, torch.ones_like(policy))
    preference = credit.pareto_preference(torch.stack([inputs.tensor(f"rewards_{k}") for k in (0, 1)], 1))
    eps = params("clip_eps")
    losses = run("clipped_ratio", lp, {"reward": preference}, beta=params("beta"), clip_eps=eps, keep_ties=True)
    value = total(*losses)
    ratio = lp.ratio().exp().clamp(1 - eps, 1 + eps)
    ratios = {f"ratio_{k}": ratio[:, k] for k in (0, 1)}
    return {**made, **ratios, "preference": preference, "loss": value, **_gradients(value, leaves)}


@adapter("advantage_weighted", "matching_score", "clipped_policy_gradient", "velocity_kl", "velocity_kl_average")
def awm(params: Given, inputs: Given) -> dict[str, Any]:
    """Rows are ordered by time, then sample; times become units. On policy the ratio is to the policy itself."""
    times, kl_weight = params("num_t"), params("kl_weight", among=("Uniform", "ELBO"))
    weighting = params("weighting", among=("Uniform", "t", "t**2", "huber", "ghuber"))
    power, loss_type = params("ghuber_power", 0.25), params("loss_type", among=("exp_first", "sum_first"))

    def units(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (times, -1)).transpose(0, 1)[:, None]

    leaf = inputs.tensor("model_pred").requires_grad_()
    t, noise, clean = units(inputs.tensor("t")), units(inputs.tensor("noise")), inputs.tensor("clean")
    x0 = clean[:, None, None].expand_as(noise)
    line = Rectified()
    noised, target = line.add_noise(x0, noise, t), line.target(x0, noise, t)
    prediction = units(leaf)
    names = {"reference": "ref_pred", "average": "ema_pred"}
    others = {role: units(inputs.tensor(name)) for role, name in names.items() if name in inputs}
    by_role = {"policy": -denoising_error(prediction, target, (2,))}
    gap = {role: denoising_error(prediction, other, (2,)) for role, other in others.items()}
    raw = LogProbs(by_role, torch.ones_like(t), gap, extra={"t": t})
    lp = shaped("matching_score", raw, {}, weighting=weighting, power=power)
    score = lp.by_role["policy"]
    bound, most, clip = params("adv_clip_max"), params("advantage_max"), params("clip_range")
    labels = {"advantage": inputs.tensor("advantages")[:, None]}
    scaled = advantage(lp, labels, bound, most)[..., 0]
    old = score.detach()
    if params("on_policy", among=(True, False)):
        policy = total(*run("advantage_weighted", lp, labels, adv_clip_max=bound, advantage_max=most))
    else:
        old = inputs.tensor("old_log_prob").T[:, None]
        lp = LogProbs({"policy": score, "behaviour": old}, lp.mask)
        options = {"clip_low": clip, "clip_high": clip, "adv_clip_max": None}
        level = "candidate" if loss_type == "sum_first" else "unit"
        policy = total(*run("clipped_policy_gradient", lp, {"advantage": scaled}, level=level, **options))
    value, made = policy, {}
    for role, objective, name in (("reference", "velocity_kl", "kl"), ("average", "velocity_kl_average", "ema_kl")):
        strength = params(f"{name}_beta", 0.0)
        if role in others:
            made[f"{name}_loss"] = total(*run(objective, raw, {}, weight=kl_weight))
            value = value + strength * made[f"{name}_loss"]
        assert role in others or not strength
    together = loss_type == "sum_first"
    ratio = (score.mean(2) - old.mean(2)).exp() if together else (score - old).exp().transpose(0, 2).squeeze(1)
    return {
        "loss": value,
        "policy_loss": policy,
        **made,
        "log_prob": score[:, 0].T,
        "ratio": ratio.flatten(),
        "noised": noised[:, 0].transpose(0, 1).flatten(0, 1),
        "scaled_advantages": scaled[:, 0],
        **_gradients(value, {"model_pred": leaf}),
    }


@adapter("nft", "velocity_kl")
def diffusion_nft(params: Given, inputs: Given) -> dict[str, Any]:
    """Two branches around the old policy."""
    leaf = inputs.tensor("model_pred").requires_grad_()
    old, reference, x0, noise = (inputs.tensor(name)[:, None] for name in ("old_pred", "ref_pred", "clean", "noise"))
    t, mix, prediction, line = inputs.tensor("t")[:, None], params("nft_beta"), leaf[:, None], Rectified()
    target = line.target(x0, noise, t)
    policy = -denoising_error(prediction, target)
    sizes = {name: size[..., None] for name, size in branch_sizes(prediction, old, target, mix, 2).items()}
    extra = {"t": t[..., None], "mix": torch.full_like(policy, mix), **sizes}
    gap = {"behaviour": denoising_error(prediction, old), "reference": denoising_error(prediction, reference)}
    by_role = {"policy": policy, "behaviour": -denoising_error(old, target)}
    lp = LogProbs(by_role, torch.ones_like(policy), gap, extra=extra)
    modes = ("all", "positive_only", "negative_only", "one_only", "binary")
    mode, bound = params("adv_mode", among=modes), params("adv_clip_max")
    labels = {"advantage": inputs.tensor("advantages")[:, None]}
    policy_loss = total(*run("nft", lp, labels, adv_clip_max=bound, adv_mode=mode))
    kl = total(*run("velocity_kl", lp, labels))
    value = policy_loss + params("kl_beta") * kl
    positive, negative = (loss[:, 0, 0] for loss in branch_losses(lp))
    return {
        "loss": value,
        "policy_loss": policy_loss,
        "kl_loss": kl,
        "r": credit.optimality_probability(inputs.tensor("advantages"), clip_max=bound, kind=mode),
        "positive_loss": positive,
        "negative_loss": negative,
        "positive_weight": (extra["t"] * extra["positive"]).clamp_min(1e-5)[:, 0, 0],
        "negative_weight": (extra["t"] * extra["negative"]).clamp_min(1e-5)[:, 0, 0],
        **_gradients(value, {"model_pred": leaf}),
    }


@adapter("sigmoid", "difference", "sft")
def dso(params: Given, inputs: Given) -> dict[str, Any]:
    """Stable and unstable shapes: winners first, then losers, one time per pair."""
    objective = params("objective", among=("dpo", "dro", "sft"))
    params("sample_same_epsilon", True, among=(True, False))
    sides = ("win",) if objective == "sft" else ("win", "lose")
    leaf = inputs.tensor("model_pred").requires_grad_()

    def pairs(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (len(sides), -1)).transpose(0, 1)

    x0 = torch.stack([inputs.tensor(f"x0_{side}") for side in sides], 1)
    t, noise = inputs.tensor("t")[:, None].expand(-1, len(sides)), pairs(inputs.tensor("noise"))
    target = Rectified().target(x0, noise, t)
    by_role = {"policy": -denoising_error(pairs(leaf), target)}
    if objective == "dpo":
        other = pairs(inputs.tensor("ref_noise")) if "ref_noise" in inputs else noise
        reference = -denoising_error(pairs(inputs.tensor("ref_pred")), Rectified().target(x0, other, t))
        by_role["reference"] = reference
    lp = LogProbs(by_role, torch.ones_like(by_role["policy"]))
    first = torch.tensor([1.0, 0.0][: len(sides)], dtype=torch.float64).expand(len(x0), -1)
    if objective == "dpo":
        half = LogProbs({role: 0.5 * value for role, value in by_role.items()}, lp.mask, scale=0.5)
        losses = run("sigmoid", half, {"reward": first}, beta=params("beta"))
        ratio = half.ratio()
        made = {"logits": params("beta") * (ratio[:, 0] - ratio[:, 1])}
        made |= {f"ref_err_{side}": -reference[:, k, 0] for k, side in enumerate(sides)}
    elif objective == "dro":
        losses, made = run("difference", lp, {"desirable": first}, per="record"), {}
    else:
        losses, made = run("sft", lp, {"reward": first}), {}
    value = total(*losses)
    made |= {f"model_err_{side}": -by_role["policy"][:, k, 0] for k, side in enumerate(sides)}
    return {**made, "loss": value, **_gradients(value, {"model_pred": leaf})}


@adapter("clipped_policy_gradient", "k3_kl", requires=("loss", "grad"))
def text_mo_grpo(params: Given, inputs: Given) -> dict[str, Any]:
    """Several rewards to one advantage, then the token-level clip with a k3 penalty."""
    size, weights = params("num_generations"), torch.tensor(params("weights"), dtype=torch.float64)
    order = params("aggregation", among=("sum_then_normalize", "normalize_then_sum"))
    spread = params("scale", "group", among=("group", "none"))
    rewards = inputs.tensor("rewards_per_objective")
    normalised = order == "normalize_then_sum"
    combined = credit.total(rewards.unflatten(0, (-1, size)), weights, "normalised" if normalised else "sum")
    gains = credit.advantages(combined, spread="all" if normalised else spread, ddof=1).flatten()
    leaf = inputs.tensor("policy_token_logps").requires_grad_()

    def grouped(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, size))

    old = inputs.tensor("old_token_logps") if "old_token_logps" in inputs else leaf.detach()
    by_role = {"policy": grouped(leaf), "behaviour": grouped(old)}
    beta = params("beta", 0.0)
    if "ref_token_logps" in inputs:
        by_role["reference"] = grouped(inputs.tensor("ref_token_logps"))
    lp = LogProbs(by_role, grouped(inputs.tensor("mask")))
    labels = {"advantage": grouped(gains)}
    clip = {"clip_low": params("epsilon_low"), "clip_high": params("epsilon_high"), "adv_clip_max": None}
    reductions = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "fixed"}
    longest = params("max_completion_length", None)
    how = {"reduction": reductions[params("loss_type", among=tuple(reductions))], "max_length": longest}

    def losses(**reduction: Any) -> tuple[Tensor, Tensor]:
        (policy,) = run("clipped_policy_gradient", lp, labels, **clip, **reduction)
        if not beta:
            return total(policy), policy.value
        (kl,) = run("k3_kl", lp, labels, **reduction)
        return total(policy) + beta * total(kl), policy.value + beta * kl.value

    value, _ = losses(**how)
    _, per_token = losses(reduction="token")
    (gradient,) = torch.autograd.grad(value, leaf)
    return {
        "advantages": gains,
        "combined_rewards": combined.flatten(),
        "loss": value,
        "per_token_loss": per_token.flatten(0, 1),
        "grad": {"policy_token_logps": gradient},
    }
