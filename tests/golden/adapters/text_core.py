"""Text objectives that diffusion shares, and the reference-free, ranked, pointwise and regulariser losses of text.

Side 0 of a pair is the one the files call chosen; masked positions hold garbage on purpose. Everything is float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.likelihood import token_kl
from diffalign.objectives import pointwise, ranked, reference_free
from diffalign.objectives.pair import oriented, oriented_margin
from diffalign.types import LogProbs, Loss

from .common import Given, adapter, run, total

SIDES = ("chosen", "rejected")
REQUIRES = ("loss", "grad")


class Placed(NamedTuple):
    """Inputs as the library takes them."""

    lp: LogProbs
    labels: dict[str, Tensor]
    leaves: dict[str, Tensor]
    """The policy's inputs by name."""


def _stack(sides: Sequence[Tensor]) -> Tensor:
    """(B, K, U) of K times (B, U), padded with 0."""
    longest = max(side.shape[1] for side in sides)
    return torch.stack([F.pad(side, (0, longest - side.shape[1])) for side in sides], 1)


def _place(inputs: Given, reference: bool = True, sides: Sequence[str] = SIDES) -> Placed:
    """Candidates best first: per token with masks, or summed in one unit, each side as it is given."""
    endings = {side: "token_logps" if f"policy_{side}_token_logps" in inputs else "logps" for side in sides}

    def read(role: str) -> dict[str, Tensor]:
        names = (f"{role}_{side}_{ending}" for side, ending in endings.items())
        return {name: inputs.tensor(name) for name in names}

    def joined(values: Mapping[str, Tensor]) -> Tensor:
        return _stack([value if value.ndim == 2 else value[:, None] for value in values.values()])

    def counted(side: str, leaf: Tensor) -> Tensor:
        return inputs.tensor(f"{side}_mask") if endings[side] == "token_logps" else torch.ones_like(leaf[:, None])

    leaves = {name: value.requires_grad_() for name, value in read("policy").items()}
    by_role = {"policy": joined(leaves)}
    if reference:
        by_role["reference"] = joined(read("ref"))
    mask = _stack([counted(side, leaf.detach()) for side, leaf in zip(sides, leaves.values(), strict=True)])
    reward = torch.arange(len(sides), 0, -1, dtype=torch.float64).expand(len(mask), -1)
    return Placed(LogProbs(by_role, mask), {"reward": reward}, leaves)


def _grad(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    return dict(zip(leaves, found, strict=True))


def _rewards(rewards: Tensor) -> dict[str, Any]:
    """What is logged of implicit rewards (B, 2)."""
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        **{f"{side}_rewards": value for side, value in zip(SIDES, rewards.unbind(1), strict=True)},
        "margins": margins,
        "accuracy": (margins > 0).double().mean(),
    }


def _result(leaves: Mapping[str, Tensor], main: Loss, *others: Loss) -> dict[str, Any]:
    value = total(main, *others)
    return {"per_example_loss": main.value, "loss": value, "grad": _grad(value, leaves)}


# --- pairs --------------------------------------------------------------------------------------------------------


@adapter("sigmoid", "contrastive", requires=REQUIRES)
def text_dpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    beta, smoothing = params("beta"), params("label_smoothing", 0.0)
    free = {"sft_weight": 0.0} if params("reference_free", False, among=(True, False)) else {}
    losses = run("contrastive" if free else "sigmoid", lp, labels, beta=beta, label_smoothing=smoothing, **free)
    return {**_result(leaves, *losses), **_rewards(beta * lp.ratio())}


@adapter("robust", requires=REQUIRES)
def text_robust_dpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    beta = params("beta")
    losses = run("robust", lp, labels, beta=beta, flip_rate=params("label_smoothing"))
    return {**_result(leaves, *losses), **_rewards(beta * lp.ratio())}


@adapter("ipo", requires=REQUIRES)
def text_ipo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    tau, how = params("tau"), "mean" if params("length_normalize", among=(True, False)) else "sum"
    return {**_result(leaves, *run("ipo", lp, labels, tau=tau, normalize=how)), **_rewards(tau * lp.ratio())}


@adapter("hinge", "slic_hf", requires=REQUIRES)
def text_slic(params: Given, inputs: Given) -> dict[str, Any]:
    if params("variant", among=("ref_hinge", "slic_hf")) == "ref_hinge":
        lp, labels, leaves = _place(inputs)
        beta = params("beta")
        return {**_result(leaves, *run("hinge", lp, labels, beta=beta)), **_rewards(beta * lp.ratio())}
    sides = ("sft", *SIDES) if "policy_sft_logps" in inputs else SIDES
    lp, labels, leaves = _place(inputs, reference=False, sides=sides)
    for name in (f"ref_{side}_{ending}" for side in SIDES for ending in ("logps", "token_logps")):
        inputs(name, None)  # of no use here
    delta = params("delta", 1.0)
    (alone,) = run("slic_hf", lp, labels, delta=delta, sft_weight=0.0)
    losses = run("slic_hf", lp, labels, delta=delta, sft_weight=params("lambda_reg"))
    return {**_result(leaves, *losses), "calibration": alone.value, **_rewards(lp.sum()[:, -2:])}


@adapter("gpo", requires=REQUIRES)
def text_gpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs)
    known = ("logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage")
    link, beta = params("link", among=known), params("beta")
    losses = run("gpo", lp, labels, link=link, beta=beta)
    return {**_result(leaves, *losses), "margins": beta * oriented_margin(lp, labels)[0]}


# --- without reference --------------------------------------------------------------------------------------------


@adapter("simpo", requires=REQUIRES)
def text_simpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs, reference=False)
    beta = params("beta")
    link, smoothing = params("loss_type", "sigmoid", among=("sigmoid", "hinge")), params("label_smoothing", 0.0)
    losses = run(
        "simpo", lp, labels, beta=beta, gamma_beta_ratio=params("gamma_beta_ratio"), link=link,
        label_smoothing=smoothing if link == "sigmoid" else 0.0, sft_weight=params("sft_weight", 0.0),
    )  # fmt: skip
    nll = total(*run("sft", lp, labels))
    return {**_result(leaves, *losses), "sft_loss": nll, **_rewards(beta * lp.mean())}


@adapter("asft", requires=REQUIRES)
def text_asft(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs, reference=False)
    beta = params("beta", 1.0)
    losses = run("asft", lp, labels, odds_weight=params("lambda"), sft_weight=params("sft_weight", 1.0), beta=beta)
    return {
        **_result(leaves, *losses),
        "align_term": reference_free.alignment_term(lp.mean(), labels, beta),
        **{
            f"{side}_log_odds": odds
            for side, odds in zip(SIDES, reference_free.log_odds(lp.mean()).unbind(1), strict=True)
        },
    }


@adapter("orpo", requires=REQUIRES)
def text_orpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, labels, leaves = _place(inputs, reference=False)
    weight = params("lambda")
    (loss,) = run("orpo", lp, labels, odds_weight=weight)
    ratio, _ = oriented(reference_free.log_odds(lp.mean()), lp, labels)
    (bare,) = run("orpo", lp, labels, odds_weight=0.0)
    (unit,) = run("orpo", lp, labels, odds_weight=1.0)
    return {**_result(leaves, loss), "log_odds_ratio": ratio, "or_term": unit.value - bare.value}


@adapter("tpo", requires=REQUIRES)
def text_tpo(params: Given, inputs: Given) -> dict[str, Any]:
    """TRL's four losses: ``ipo`` and ``tpo-l`` are of means per token. Without weight on the gold there may be none."""
    sides = ("gold", *SIDES) if "policy_gold_token_logps" in inputs else SIDES
    lp, labels, leaves = _place(inputs, reference=False, sides=sides)
    kind = params("loss_type", among=("sigmoid", "tpo-l", "hinge", "ipo"))
    beta, alpha, gamma = params("beta"), params("alpha"), params("tpo_l_gamma", 0.5)
    if len(sides) == 2:  # a gold answer without tokens
        assert alpha == 0
        best = {"reward": torch.cat([labels["reward"][:, :1] + 1, labels["reward"]], 1)}
        padded = torch.cat([lp.by_role["policy"][:, :1].detach(), lp.by_role["policy"]], 1)
        lp, labels = LogProbs({"policy": padded}, torch.cat([0 * lp.mask[:, :1], lp.mask], 1)), best
    how = "mean" if kind in ("tpo-l", "ipo") else "sum"
    link, smoothing = "sigmoid" if kind == "tpo-l" else kind, params("label_smoothing", 0.0)
    losses = run(
        "tpo", lp, labels, beta=beta, alpha=alpha, normalize=how, gamma=gamma if kind == "tpo-l" else 0.0, link=link,
        label_smoothing=smoothing if link == "sigmoid" else 0.0,
    )  # fmt: skip
    result = _result(leaves, *losses)
    rewards = _rewards(beta * (lp.mean() if how == "mean" else lp.sum())[:, 1:])
    return {**result, "nll_loss": total(*run("sft", lp, labels)), **rewards}


# --- lists --------------------------------------------------------------------------------------------------------


def _lists(inputs: Given, policy: str, **others: str) -> tuple[LogProbs, dict[str, Tensor]]:
    """(B, n, 1) summed log-probs of a list."""
    leaf = inputs.tensor(policy).requires_grad_()
    by_role = {role: inputs.tensor(name)[..., None] for role, name in others.items()}
    present = inputs.tensor("mask") if "mask" in inputs else None
    return LogProbs({"policy": leaf[..., None], **by_role}, torch.ones(*leaf.shape, 1), present=present), {policy: leaf}


@adapter("plackett_luce", requires=REQUIRES)
def text_plackett_luce(params: Given, inputs: Given) -> dict[str, Any]:
    """Lists are stored best first."""
    lp, leaves = _lists(inputs, "policy_logps", reference="ref_logps")
    reward = torch.arange(lp.mask.shape[1], 0, -1, dtype=torch.float64).expand(lp.mask.shape[:2])
    beta = params("beta")
    rewards = torch.where(lp.exists > 0, beta * lp.ratio(), 0.0)
    return {**_result(leaves, *run("plackett_luce", lp, {"reward": reward}, beta=beta)), "rewards": rewards}


@adapter("anchored", requires=REQUIRES)
def text_adpo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, leaves = _lists(inputs, "policy_logps", reference="anchor_logps")
    names = {"softmax_group_normalized": "normalized", "softmax_raw": "raw", "given": "given"}
    target, temperature = names[params("target", among=tuple(names))], params("beta_reward", 0.5)
    labels = {"reward": inputs.tensor("rewards")}
    (loss,) = run("anchored", lp, labels, tau=params("tau"), beta_reward=temperature, target=target)
    q = ranked.anchored_target(labels["reward"], lp.exists, target, temperature)
    return {**_result(leaves, loss), "target": q, "per_example_kl": loss.value - ranked.entropy(q)}


@adapter("brain", requires=REQUIRES)
def text_brain(params: Given, inputs: Given) -> dict[str, Any]:
    lp, leaves = _lists(inputs, "policy_logps", reference="sft_logps", behaviour="proposal_logps")
    labels = {"reward": inputs.tensor("rewards")}
    gamma, hard = params("gamma", 1.0), params("hard_posterior", False, among=(True, False))
    both = ranked.posterior(lp, labels, gamma, hard)
    return {
        **_result(leaves, *run("brain", lp, labels, gamma=gamma, hard=hard)),
        "posterior_weights": both.target,
        "policy_weights": both.policy.exp(),
    }


# --- one at a time ------------------------------------------------------------------------------------------------


def _single(leaf: Tensor, reference: Tensor | None = None) -> LogProbs:
    """(B, 1, 1) summed log-probs of unpaired completions."""
    by_role = {"policy": leaf[:, None, None]}
    if reference is not None:
        by_role["reference"] = reference[:, None, None]
    return LogProbs(by_role, torch.ones(len(leaf), 1, 1, dtype=leaf.dtype))


@adapter("kto", requires=REQUIRES)
def text_kto(params: Given, inputs: Given) -> dict[str, Any]:
    leaf = inputs.tensor("policy_logps").requires_grad_()
    mismatched = _single(inputs.tensor("kl_policy_logps"), inputs.tensor("kl_ref_logps")).ratio()
    lp = replace(_single(leaf, inputs.tensor("ref_logps")), extra={"mismatched": mismatched})
    labels = {"desirable": inputs.tensor("desirable")[:, None]}
    beta, weights = params("beta"), {n: params(n) for n in ("desirable_weight", "undesirable_weight")}
    (loss,) = run("kto", lp, labels, beta=beta, **weights)
    return {
        **_result({"policy_logps": leaf}, loss),
        "per_example_loss": loss.value[:, 0],
        "kl": pointwise.reference_point(lp),
        "rewards": beta * lp.ratio()[:, 0],
    }


@adapter("ddo", requires=REQUIRES)
def text_ddo(params: Given, inputs: Given) -> dict[str, Any]:
    sides = ("data", "generated")
    leaves = {f"{side}_policy_logps": inputs.tensor(f"{side}_policy_logps").requires_grad_() for side in sides}
    reference = torch.cat([inputs.tensor(f"{side}_ref_logps") for side in sides])
    real = torch.cat([torch.full_like(leaf.detach(), 1.0 - i) for i, leaf in enumerate(leaves.values())])
    lp, labels = _single(torch.cat(list(leaves.values())), reference), {"desirable": real[:, None]}
    beta = params("beta")
    value = total(*run("ddo", lp, labels, alpha=params("alpha"), beta=beta))
    plain = run("ddo", lp, labels, alpha=1.0, beta=beta)
    losses = {f"{side}_loss": part.value[part.weight > 0] for side, part in zip(sides, plain, strict=True)}
    return {"loss": value, "grad": _grad(value, leaves), **losses}


@adapter("pmpo", "forward_kl", "forward_kl_exact", requires=REQUIRES)
def text_pmpo(params: Given, inputs: Given) -> dict[str, Any]:
    """A side may be missing; the KL is that of samples of the reference, or exact over the vocabulary."""
    leaves = {n: inputs.tensor(n).requires_grad_() for n in ("accepted_logps", "rejected_logps") if n in inputs}
    alpha, beta = params("alpha"), params("beta")
    verdict = [torch.full((len(v), 1), float(n.startswith("acc")), dtype=v.dtype) for n, v in leaves.items()]
    value = total(
        *run("pmpo", _single(torch.cat(list(leaves.values()))), {"desirable": torch.cat(verdict)}, alpha=alpha)
    )
    means = {n.replace("_logps", "_mean_logp"): _single(v).sum().mean() for n, v in leaves.items()}
    if params("kl", among=("mc", "full")) == "mc":
        leaves["policy_logps_on_ref_samples"] = leaf = inputs.tensor("policy_logps_on_ref_samples").requires_grad_()
        divergence = total(*run("forward_kl", _single(leaf, inputs.tensor("ref_logps_on_ref_samples")), {}))
    else:
        leaves["policy_logits"] = leaf = inputs.tensor("policy_logits").requires_grad_()
        exact = token_kl(inputs.tensor("ref_logits"), leaf)[:, None]
        mask = inputs.tensor("mask")[:, None] if "mask" in inputs else torch.ones_like(exact.detach())
        divergence = total(*run("forward_kl_exact", LogProbs({"policy": exact}, mask, extra={"forward_kl": exact}), {}))
    value = value + beta * divergence
    return {"loss": value, "forward_kl": divergence, "grad": _grad(value, leaves), **means}


# --- regularisers -------------------------------------------------------------------------------------------------

NLL = {"sft_token_mean": "token", "nll_per_sequence_mean": "sequence", "nll_sum": "sum"}


@adapter("sft", "dpop", "likelihood_floor", requires=REQUIRES)
def text_regularizers(params: Given, inputs: Given) -> dict[str, Any]:
    """Of the preferred completions alone; values per row are of these."""
    lp, labels, leaves = _place(inputs)
    kind = params("kind", among=(*NLL, "dpop", "likelihood_floor"))
    if kind == "dpop":
        return _result(leaves, *run("dpop", lp, labels, beta=params("beta"), penalty=params("lambda")))
    if kind == "likelihood_floor":
        (loss,) = run("likelihood_floor", lp, labels, margin=params("margin"))
    else:
        (loss,) = run("sft", lp, labels, reduction=NLL[kind])
    return {**_result(leaves, loss), "per_example_loss": loss.value[:, 0]}
