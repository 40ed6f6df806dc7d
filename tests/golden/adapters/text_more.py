"""Text pairs beyond the plain losses: shapings, numbers beside the preference, self-play.

Side 0 of a pair is the one the files call chosen (or first); everything is float64.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.objectives import game, rewarded, shaping
from diffalign.types import LogProbs

from .common import Given, adapter, run, shaped, total
from .text_core import REQUIRES, SIDES, _grad, _place, _result, _rewards, _stack
from .text_unpaired import single


def both(inputs: Given, name: str) -> Tensor:
    """``name_chosen`` and ``name_rejected`` as (B, 2, ...)."""
    return torch.stack([inputs.tensor(f"{name}_{side}") for side in SIDES], 1)


def also(lp: LogProbs, inputs: Given, role: str) -> LogProbs:
    """With another role, in the style of the policy's inputs."""
    tokens = f"{role}_chosen_token_logps" in inputs
    sides = [inputs.tensor(f"{role}_{side}_{'token_logps' if tokens else 'logps'}") for side in SIDES]
    return replace(lp, by_role={**lp.by_role, role: _stack([side if tokens else side[:, None] for side in sides])})


def first_wins(lp: LogProbs) -> Tensor:
    """Win probabilities (B, 2) of 1 and 0."""
    return torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(lp.mask), 2)


def gap(values: Tensor) -> Tensor:
    return values[:, 0] - values[:, 1]


# --- shapings -----------------------------------------------------------------------------------------------------


@adapter("f_divergence", "sigmoid", requires=REQUIRES)
def text_fdpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    known = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    divergence, beta = params("divergence", among=known), params("beta")
    alpha = {"alpha": params("alpha")} if "alpha" in params else {}
    scored = shaped("f_divergence", lp, labels, divergence=divergence, **alpha)
    scores = scored.ratio()
    return {
        **_result(leaves, *run("sigmoid", scored, labels, beta=beta)),
        **_rewards(beta * scores),
        **{f"{side}_scores": value for side, value in zip(SIDES, scores.unbind(1), strict=True)},
    }


def token_weights(found: Tensor, inputs: Given) -> dict[str, Tensor]:
    """Weights (B, 2, U) by side, each as long as its mask."""
    lengths = (len(inputs(f"{side}_mask")[0]) for side in SIDES)
    return {f"{side}_token_weights": found[:, i, :n] for i, (side, n) in enumerate(zip(SIDES, lengths, strict=True))}


@adapter("length_desensitised", "sigmoid", requires=REQUIRES)
def text_ld_dpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    alpha, beta = params("ld_alpha"), params("beta")
    shorter = shaped("length_desensitised", lp, labels, alpha=alpha)
    return {
        **_result(leaves, *run("sigmoid", shorter, labels, beta=beta)),
        **_rewards(beta * shorter.ratio()),
        **token_weights(shaping.desensitised_weights(lp, alpha), inputs),
    }


@adapter("token_guided", "sigmoid", requires=REQUIRES)
def text_tgdpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    lp = also(lp, inputs, "guide")
    alpha, beta = params("alpha"), params("beta")
    guided = shaped("token_guided", lp, labels, alpha=alpha, beta=beta)
    return {
        **_result(leaves, *run("sigmoid", guided, labels, beta=beta)),
        "margins": beta * gap(guided.ratio()),
        **token_weights(shaping.guided_weights(lp, labels, alpha, beta), inputs),
    }


@adapter("first_difference", "visit_smoothed", requires=REQUIRES)
def text_mcts_cdpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    ids = _stack([inputs.tensor(f"{side}_ids") for side in SIDES])
    labels = {**labels, "ids": ids, "visits": both(inputs, "visits")}
    ends = shaped("first_difference", lp, labels)
    return {
        **_result(leaves, *run("visit_smoothed", ends, labels, beta=params("beta"))),
        "label_smoothing": rewarded.visit_smoothing(lp, labels),
    }


# --- numbers beside the preference --------------------------------------------------------------------------------


@adapter("madpo", requires=REQUIRES)
def text_madpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    score, beta = both(inputs, "reward"), params("beta")
    curve = {"c_max": params("c_max"), "c_min": params("c_min"), "sharpness": params("lambda"), "tau": params("tau")}
    coefficient, weight = rewarded.margin_weight(gap(score), **curve)
    return {
        **_result(leaves, *run("madpo", lp, {**labels, "score": score}, beta=beta, **curve)),
        **_rewards(beta * lp.ratio()),
        "coefficient": coefficient,
        "weight": weight,
    }


@adapter("modpo", requires=REQUIRES)
def text_modpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    labels = {**labels, "others": both(inputs, "margin_reward")}
    beta, w, link = params("beta"), params("w"), params("loss_type", "sigmoid", among=("sigmoid", "hinge"))
    losses = run("modpo", lp, labels, beta=beta, w=w, link={"sigmoid": "logistic"}.get(link, link))
    return {**_result(leaves, *losses), **_rewards(rewarded.remaining_reward(lp, labels, beta, w))}


@adapter("distilled", "forward_kl", requires=REQUIRES)
def text_distill_dpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, _, leaves = _place(inputs)
    reward = both(inputs, "reward")
    reward = reward.transpose(0, 2) if reward.ndim == 3 else reward[..., None]  # files have (M, B)
    beta, gamma = params("beta"), params("gamma", 0.0)
    (loss,) = run("distilled", lp, {"reward": reward}, beta=beta)
    each = torch.stack([total(*run("distilled", lp, {"reward": model}, beta=beta)) for model in reward.unbind(-1)])
    value, found = total(loss), {}
    if "policy_logps_on_ref_samples" in inputs:
        samples, leaf = single(inputs, "policy_logps_on_ref_samples", "ref_logps_on_ref_samples")
        divergence = total(*run("forward_kl", samples, {}))
        value, leaves, found = value + gamma * divergence, {**leaves, **leaf}, {"forward_kl": divergence}
    return {
        **found,
        "per_model_mean_loss": each,
        "selected_model": each.argmin(),
        "per_example_loss": loss.value,
        "loss": value,
        "grad": _grad(value, leaves),
    }


@adapter("flex", requires=REQUIRES)
def text_flex_dpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    if "chosen_lengths" in inputs:  # sums, spread over as many units
        lengths = torch.stack([inputs.tensor(f"{side}_lengths") for side in SIDES], 1)[..., None].clamp_min(1)
        mask = (torch.arange(int(lengths.max())) < lengths).double()
        lp = LogProbs({role: (value / lengths).expand_as(mask) for role, value in lp.by_role.items()}, mask)
    chosen, rejected = params("beta_chosen"), params("beta_rejected")
    how = params("sft_reduction", "token_mean", among=("token_mean", "sum"))  # the mean is of each sequence's tokens
    sft = {"sft_weight": params("sft_weight", 0.0), "sft_reduction": {"token_mean": "mean"}.get(how, how)}
    losses = run("flex", lp, labels, beta_chosen=chosen, beta_rejected=rejected, **sft)
    ratio = lp.ratio()
    return {**_result(leaves, *losses), "margins": chosen * ratio[:, 0] - rejected * ratio[:, 1]}


# --- self-play ----------------------------------------------------------------------------------------------------


@adapter("sppo", requires=REQUIRES)
def text_sppo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, _, leaves = _place(inputs)
    variant = params("variant", among=("soft", "hard", "single"))
    win = first_wins(lp)
    if variant == "soft":
        win = torch.stack([inputs.tensor(f"{side}_win_prob") for side in SIDES], 1)
    elif variant == "single":
        first = inputs.tensor("chosen_beats_rejected_prob")
        win = torch.stack([first, 1 - first], 1)
    reduction = params("reduction", among=("half_sum", "sum"))
    losses = run("sppo", lp, {"win_prob": win}, eta=params("eta"), variant=variant, reduction=reduction)
    ratios = zip(SIDES, lp.ratio().unbind(1), strict=True)
    return {**_result(leaves, *losses), **{f"{side}_log_ratio": value for side, value in ratios}}


@adapter("dno", requires=REQUIRES)
def text_dno(params: Given, inputs: Given) -> dict[str, Any]:
    lp, _, leaves = _place(inputs)
    variant, eta = params("variant", among=("soft", "prct")), params("eta")
    win = first_wins(lp)
    if variant == "soft":
        win = torch.stack([inputs.tensor(f"win_rate_{side}") for side in ("first", "second")], 1)
    labels = {"win_prob": win}
    return {
        **_result(leaves, *run("dno", lp, labels, eta=eta, variant=variant)),
        "margins": eta * gap(lp.ratio()),
        "target": game.win_target(lp, labels, variant),
    }


@adapter("inpo", requires=REQUIRES)
def text_inpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    lp, share = also(lp, inputs, "prev"), params("tau_over_eta")
    return {
        **_result(leaves, *run("inpo", lp, labels, eta=params("eta"), reference_weight=share)),
        "h": game.anchored_gap(lp, labels, {"reference": share, "prev": 1 - share})[0],
    }


@adapter("mnpo", requires=REQUIRES)
def text_mnpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    iterates = zip(*(inputs(f"history_{side}_logps") for side in SIDES), strict=True)
    history = {f"history.{age}": torch.tensor(sides, dtype=torch.float64).T for age, sides in enumerate(iterates)}
    lp = replace(lp, by_role={**lp.by_role, **{role: value[..., None] for role, value in history.items()}})
    mixture = {
        "reference_weight": params("ratio"),
        "history_weights": params("weights"),
        "max_history": params("max_history"),
    }
    return {
        **_result(leaves, *run("mnpo", lp, labels, eta=params("eta"), **mixture)),
        "h": game.anchored_gap(lp, labels, game.history_anchors(lp, **mixture))[0],
    }


@adapter("online_ipo", requires=REQUIRES)
def text_online_ipo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, _, leaves = _place(inputs)
    target, beta = params("target", among=("vs_third", "half")), params("beta")
    first, second = inputs.tensor("pref_first"), inputs("pref_second", None)
    second = 1 - first if target == "half" else torch.tensor(second, dtype=torch.float64)
    labels = {"win_prob": torch.stack([first, second], 1)}
    normalize = params("length_normalize", False, among=(False, True))
    losses = run("online_ipo", lp, labels, beta=beta, target=target, length_normalize=normalize)
    return {**_result(leaves, *losses), "target": game.preference_gap(lp, labels, target) / beta}
