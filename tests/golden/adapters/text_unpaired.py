"""Text without pairs, and what is no loss: values, turns, credit, exact games, curricula, weights, diagnostics."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffalign import choices, diagnostics, games, merging, token_credit
from diffalign.likelihood import geometric_mixture
from diffalign.objectives import pointwise, values
from diffalign.types import LogProbs

from .common import Given, adapter, run, total
from .text_core import REQUIRES, SIDES, _grad, _rewards, _stack


def single(inputs: Given, policy: str, reference: str, mask: str | None = None) -> tuple[LogProbs, dict[str, Tensor]]:
    """(B, 1, U) log-probs of unpaired candidates, and the policy's input by name."""
    leaf = inputs.tensor(policy).requires_grad_()
    shape = (len(leaf), 1, -1)
    by_role = {"policy": leaf.reshape(shape), "reference": inputs.tensor(reference).reshape(shape)}
    units = inputs.tensor(mask).reshape(shape) if mask else torch.ones_like(by_role["reference"])
    return LogProbs(by_role, units), {policy: leaf}


def assistant(inputs: Given, roles: str) -> Tensor:
    """The mask of the tokens that the assistant wrote, which the files mark with 1."""
    return (inputs.tensor(roles) == 1).double()


@adapter("nash_md", requires=REQUIRES)
def text_nash_md_pg(params: Given, inputs: Given) -> dict[str, Any]:
    lp, leaves = single(inputs, "policy_token_logps", "ref_token_logps", "mask")
    credit = params("kl_credit", among=("token", "sequence"))
    labels = {"win_prob": inputs.tensor("preference_prob")[:, None]}
    (loss,) = run("nash_md", lp, labels, tau=params("tau"), kl_credit=credit)
    return {
        "per_example_loss": loss.value[:, 0],
        "loss": total(loss),
        "sequence_log_ratio": lp.ratio()[:, 0],
        "grad": _grad(total(loss), leaves),
    }


@adapter(requires=("log_probs",))
def text_geometric_mixture(params: Given, inputs: Given) -> dict[str, Any]:
    policy, reference = inputs.tensor("policy_logits"), inputs.tensor("ref_logits")
    return {"log_probs": geometric_mixture(policy, reference, params("mixture_coef"))}


@adapter(requires=("policies",))
def text_nash_tabular(params: Given, inputs: Given) -> dict[str, Any]:
    known = {**{name: name for name in games.UPDATES}, "apo_mwu": "mwu"}
    algorithm, tau = known[params("algorithm", among=tuple(known))], params("tau")
    preference, reference = inputs.tensor("preference"), inputs.tensor("reference_policy")
    policies = games.play(
        preference,
        reference,
        inputs.tensor("initial_policy"),
        algorithm=algorithm,
        eta=params("eta"),
        tau=tau,
        steps=params("steps"),
        momentum=params("momentum", 0.0),
    )
    found = {"policies": policies, "exploitability": games.exploitability(policies, preference)}
    if tau > 0:
        best = games.equilibrium(preference, reference, tau)
        found |= {"equilibrium": best, "kl_equilibrium_to_policy": games.kl(best, policies)}
    return found


@adapter("dro_v", requires=("loss", "grad", "policy_grad_rescaled", "value_grad"))
def text_dro_v(params: Given, inputs: Given) -> dict[str, Any]:
    lp, leaves = single(inputs, "policy_logps", "ref_logps")
    leaves["values"] = inputs.tensor("values").requires_grad_()
    lp = LogProbs(lp.by_role, lp.mask, extra={"values": leaves["values"].reshape(lp.mask.shape)})
    tau, labels = params("tau"), {"reward": inputs.tensor("rewards")[:, None]}
    (joint,) = run("dro_v", lp, labels, tau=tau, joint=True)
    apart = _grad(total(*run("dro_v", lp, labels, tau=tau)), leaves)
    return {
        "residual": (values.value_target(lp, labels, tau) - lp.extra["values"]).flatten(),
        "per_example_loss": joint.value[:, 0],
        "loss": total(joint),
        "policy_grad_rescaled": apart["policy_logps"],
        "value_grad": apart["values"],
        "grad": _grad(total(joint), leaves),
    }


@adapter("direct_advantage", requires=REQUIRES)
def text_dapo_advantage(params: Given, inputs: Given) -> dict[str, Any]:
    lp, leaves = single(inputs, "step_policy_logps", "step_ref_logps")
    names = ("values_before", "values_after", "terminal", "rewards")
    advantages = token_credit.step_advantages(*(inputs.tensor(name) for name in names))
    (loss,) = run("direct_advantage", lp, {"advantage": advantages[:, None]}, beta=params("beta"))
    return {
        "advantages": advantages,
        "per_example_loss": loss.value[:, 0],
        "loss": total(loss),
        "grad": _grad(total(loss), leaves),
    }


@adapter("oreo", requires=("loss", "grad", "value_loss", "policy_loss"))
def text_oreo(params: Given, inputs: Given) -> dict[str, Any]:
    lp, leaves = single(inputs, "policy_token_logps", "ref_token_logps", "mask")
    leaves["values"] = inputs.tensor("values").requires_grad_()
    extra = {"values": leaves["values"][:, None]}
    labels = {"reward": inputs.tensor("rewards")[:, None]}
    kl_reg = params("kl_reg", 0.0)
    if "token_kl" in inputs:
        extra["kl"] = inputs.tensor("token_kl")[:, None]
    if "state_mask" in inputs:
        labels["state"] = inputs.tensor("state_mask")[:, None]
    lp = LogProbs(lp.by_role, lp.mask, extra=extra)
    granularity = params("granularity", among=("token", "step", "response"))
    losses = run(
        "oreo", lp, labels, beta=params("beta"), granularity=granularity, kl_reg=kl_reg if "kl" in extra else 0.0
    )
    return {
        "value_loss": losses[0].reduce(),
        "policy_loss": losses[1].reduce(),
        "kl_regulariser": total(*losses[2:]) if losses[2:] else 0.0,
        "loss": total(*losses),
        "grad": _grad(total(*losses), leaves),
    }


@adapter(requires=("token_rewards", "segment_rewards"))
def text_token_credit(params: Given, inputs: Given) -> dict[str, Any]:
    mask = inputs.tensor("mask")
    policy, reference = inputs.tensor("policy_token_logps"), inputs.tensor("ref_token_logps")
    rewards = token_credit.token_rewards(policy, reference, mask, params("beta"))
    return {
        "token_rewards": rewards,
        "cumulative": token_credit.cumulative(rewards, mask),
        "sequence_reward": rewards.sum(-1),
        "segment_rewards": token_credit.segment_sums(rewards, mask, inputs.tensor("segment_ids")),
    }


@adapter(requires=("token_rewards", "returns"))
def text_rto_rewards(params: Given, inputs: Given) -> dict[str, Any]:
    names = ("policy_token_logps", "ref_token_logps", "dpo_token_logps", "mask", "scores")
    shape = {"scale": params("dpo_reward_scale"), "clip": params("dpo_reward_clip"), "kl_coef": params("kl_coef")}
    found = token_credit.rto_rewards(*(inputs.tensor(name) for name in names), **shape)
    return {
        "token_rewards": found.total,
        "dense_component": found.dense,
        "kl_component": found.kl,
        "returns": found.returns,
    }


@adapter("sigmoid", "kto", requires=REQUIRES)
def text_multiturn(params: Given, inputs: Given) -> dict[str, Any]:
    beta, weights = params("beta"), ("desirable_weight", "undesirable_weight")
    if params("objective", among=("m_dpo", "m_kto")) == "m_dpo":
        sides = [single(inputs, f"policy_{side}_token_logps", f"ref_{side}_token_logps") for side in SIDES]
        by_role = {role: _stack([lp.by_role[role][:, 0] for lp, _ in sides]) for role in ("policy", "reference")}
        lp = LogProbs(by_role, _stack([assistant(inputs, f"{side}_roles") for side in SIDES]))
        leaves = {name: leaf for _, named in sides for name, leaf in named.items()}
        reward = torch.tensor([1.0, 0.0]).expand(len(lp.mask), 2)
        (loss,) = run("sigmoid", lp, {"reward": reward}, beta=beta)
        found = {**_rewards(beta * lp.ratio()), "per_example_loss": loss.value}
    else:
        lp, leaves = single(inputs, "policy_token_logps", "ref_token_logps")
        mismatched, _ = single(inputs, "kl_policy_token_logps", "kl_ref_token_logps")
        ratio = replace(mismatched, mask=assistant(inputs, "kl_roles")[:, None]).ratio()
        lp = replace(lp, mask=assistant(inputs, "roles")[:, None], extra={"mismatched": ratio})
        labels = {"desirable": inputs.tensor("desirable")[:, None]}
        (loss,) = run("kto", lp, labels, beta=beta, **{name: params(name, 1.0) for name in weights})
        found = {"kl": pointwise.reference_point(lp), "per_example_loss": loss.value[:, 0]}
    return {**found, "loss": total(loss), "grad": _grad(total(loss), leaves)}


@adapter(requires=("stages",))
def text_curriculum_pairs(params: Given, inputs: Given) -> dict[str, Any]:
    stages = [[] for _ in range(params("num_stages"))]
    for row, scores in enumerate(inputs("scores")):
        for stage, pair in zip(stages, choices.curriculum(scores, len(stages)), strict=True):
            if pair is not None:
                stage.append([row, *pair, scores[pair[0]] - scores[pair[1]]])
    return {"stages": stages}


@adapter(requires=())
def text_weight_merging(params: Given, inputs: Given) -> dict[str, Any]:
    op = params("op", among=("nesterov", "soft_reference", "merge"))
    if op == "soft_reference":
        policy, reference = inputs.tensor("policy"), inputs.tensor("reference")
        return {"reference": merging.soft_reference(policy, reference, params("alpha"))}
    if op == "merge":
        return {"merged": merging.merge(inputs.tensor("base"), list(inputs.tensor("deltas")), params("weights"))}
    trained = [inputs.tensor("initial"), *inputs.tensor("iterates_hat")]
    momentum = params("momentum")
    moved = [merging.nesterov(now, before, momentum) for before, now in pairwise(trained)]
    return {"iterates": torch.stack(moved)}


@adapter(requires=())
def text_diagnostics(params: Given, inputs: Given) -> dict[str, Any]:
    kind = params("kind", among=("topk", "kl", "curve"))
    if kind == "topk":
        found = diagnostics.top_k(inputs.tensor("logits"), params("k"))
        names = ("topk_mass", "topk_entropy_renormalized", "topk_entropy_unnormalized")
        return dict(zip(names, found, strict=True))
    if kind == "kl":
        return diagnostics.kl_estimates(inputs.tensor("policy_logps"), inputs.tensor("ref_logps"))._asdict()
    kl, shape = inputs.tensor("kl"), (params("alpha"), params("beta"))
    return {
        "sqrt_kl": kl.sqrt(),
        "predicted_gain": diagnostics.predicted_gain(kl, *shape),
        "argmax_sqrt_kl": diagnostics.best_sqrt_kl(*shape),
    }
