"""Offline diffusion methods, from network outputs to the loss.

An adapter holds no formula of its own: it places the inputs in :class:`LogProbs` through the schedule and the
likelihood, calls the registered objective and lets :class:`Loss` reduce. Everything is float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.likelihood import denoising_error
from diffalign.objectives import diffusion, pointwise, reference_free
from diffalign.objectives.pair import oriented, oriented_margin
from diffalign.schedule import Discrete, Rectified
from diffalign.train.step import preference_metrics
from diffalign.types import LogProbs

from .common import Given, adapter, run, split, total

WL, RAW = ("w", "l"), ("0", "1")


def table(params: Given, prediction: str) -> Discrete:
    given = Given(params("schedule", {"type": "scaled_linear"}))
    given("type", among=("scaled_linear",))
    steps, start, end = given("num_train_timesteps", 1000), given("beta_start", 0.00085), given("beta_end", 0.012)
    assert not given.unread, f"schedule: unknown {sorted(given.unread)}"
    return Discrete.scaled_linear(steps, start, end, prediction)


def _discrete(params: Given, inputs: Given, prediction: str) -> tuple[Discrete, Tensor]:
    """The DDPM schedule of a case and its times (B,); where a table and ``alpha_bar`` are both given, they agree."""
    if "schedule" in params or "alpha_bar" not in inputs:
        schedule = table(params, prediction)
        index = torch.tensor(inputs("timesteps"))
    else:
        inputs("timesteps", None)  # the levels themselves are given; one more, since a table of one has no unit time
        schedule = Discrete((*inputs("alpha_bar"), 0.5), prediction)
        index = torch.arange(len(inputs("alpha_bar")))
    if "alpha_bar" in inputs:
        levels = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)[index]
        torch.testing.assert_close(levels, inputs.tensor("alpha_bar"), rtol=1e-12, atol=0)
    return schedule, schedule.unit(index)


def draw_of(params: Given, inputs: Given, sides: tuple[str, str]) -> tuple[Tensor | None, Tensor, dict[str, Any]]:
    """Times (B, 2) where the case has any, the target (B, 2, ...), and the diagnostics of how it was made."""
    prediction = params("prediction_type", among=("epsilon", "v_prediction", "flow"))
    params("noise_sharing", None, among=(None, "independent for winner and loser, shared between policy and reference"))
    schedule, t = None, None
    if "sigmas" in inputs:
        assert prediction == "flow"
        schedule, t = Rectified(), inputs.tensor("sigmas")
    elif "timesteps" in inputs or "alpha_bar" in inputs:
        assert prediction != "flow"
        schedule, t = _discrete(params, inputs, prediction)
    t = None if t is None else t[:, None].expand(-1, 2)
    if f"latents_{sides[0]}" not in inputs and "latents" not in inputs:
        return t, inputs.pair("target", sides), {}
    assert schedule is not None
    assert t is not None
    x0, noise = inputs.pair("latents", sides), inputs.pair("noise", sides)
    x_t, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    made = {**split("x_t", x_t, sides), **split("target", target, sides)}
    if prediction == "v_prediction":
        clean = schedule.denoised(x_t, inputs.pair("model_pred", sides), t)
        unit = torch.ones_like(clean)
        signal, sigma = schedule.add_noise(unit, 0 * unit, t), schedule.add_noise(0 * unit, unit, t)
        eps = split("eps_pred", (x_t - signal * clean) / sigma, sides)
        made |= {f"{name}_from_v": value for name, value in eps.items()}
    return t, target, made


def _rewards(params: Given, inputs: Given, rows: int) -> Tensor:
    """(B, 2): side 0 is the winner, unless ``label_0`` says which it is; labels that are neither 0 nor 1 are ties."""
    policy = "drop rows whose label_0 is neither 0 nor 1; mean over the rows kept"
    params("tie_policy", None, among=(None, policy))
    label = inputs.tensor("label_0") if "label_0" in inputs else torch.ones(rows, dtype=torch.float64)
    label = torch.where((label == 0) | (label == 1), label, 0.5)
    return torch.stack([label, 1 - label], 1)


@adapter("sigmoid")
def diffusion_dpo(params: Given, inputs: Given) -> dict[str, Any]:
    """Pairs, oriented by reward, in the network's own parametrisation."""
    sides = ("0", "1") if "model_pred_0" in inputs else ("w", "l")
    params("err_reduction", among=("mean",))
    t, target, made = draw_of(params, inputs, sides)
    policy = inputs.pair("model_pred", sides).requires_grad_()
    reference = inputs.pair("ref_pred", sides)
    errors = {"policy": denoising_error(policy, target), "reference": denoising_error(reference, target)}
    beta, strength = params("beta"), torch.ones_like(errors["reference"])
    if params("beta_schedule", "constant", among=("constant", "one_minus_t_squared")) == "one_minus_t_squared":
        assert t is not None
        strength = (1 - t[..., None]).square()  # err_eps = (1 - sigma)^2 err_flow: beta acts on epsilon errors
    scale = 0.5 if params("half", among=(True, False)) else 1.0
    log_probs = {role: -scale * strength * error for role, error in errors.items()}
    lp = LogProbs(log_probs, torch.ones_like(strength), scale=scale)
    labels = {"reward": _rewards(params, inputs, len(policy))}
    (loss,) = run(params("objective", among=("sigmoid",)), lp, labels, beta=beta)
    value = total(loss)
    (gradient,) = torch.autograd.grad(value, policy)

    kept = loss.weight > 0
    margin, _ = oriented_margin(lp, labels)
    order = labels["reward"].argsort(dim=1, descending=True, stable=True)
    oriented = {role: error[..., 0].gather(1, order) for role, error in errors.items()}
    return {
        **made,
        "loss": value,
        "grad_model_pred": split("model_pred", gradient, sides),
        **split("err_model", oriented["policy"], ("w", "l")),
        **split("err_ref", oriented["reference"], ("w", "l")),
        "inside_term": beta * margin,
        "implicit_acc": (margin > 0)[kept].double().mean(),
        "implicit_acc_ties_half": preference_metrics(lp, labels, beta).get("reward/accuracy", math.nan),
        "beta_t": beta * strength[:, 0, 0],
        "kept": kept,
    }


def log_probs(
    errors: dict[str, Tensor], scale: float = 1.0, half: bool = False, extra: dict[str, Tensor] | None = None
) -> LogProbs:
    """``-scale * error`` of every role, halved where the case says so."""
    scale = 0.5 * scale if half else scale
    by_role = {role: -scale * error for role, error in errors.items()}
    return LogProbs(by_role, torch.ones_like(errors["policy"].detach()), scale=scale, extra=extra or {})


def pair_errors(
    inputs: Given, target: Tensor, sides: tuple[str, str], reference: bool = True, keep: Sequence[int] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's predictions (B, 2, ...) to differentiate by, and the errors of the roles."""
    leaf = inputs.pair("model_pred", sides).requires_grad_()
    errors = {"policy": denoising_error(leaf, target, keep)}
    if reference:
        errors["reference"] = denoising_error(inputs.pair("ref_pred", sides), target, keep)
    return leaf, errors


def first_wins(rows: int) -> dict[str, Tensor]:
    return {"reward": torch.tensor([1.0, 0.0]).expand(rows, 2)}


def conventions(params: Given) -> None:
    """Conventions that every file states in the same words."""
    params("err_reduction", "mean", among=("mean",))
    params("prediction_type", None, among=(None, "epsilon"))


def gradients(value: Tensor, leaf: Tensor, sides: tuple[str, str]) -> dict[str, Tensor]:
    (gradient,) = torch.autograd.grad(value, leaf)
    return split("model_pred", gradient, sides)


@adapter("sigmoid", "hinge", "ipo", "simpo")
def diffusion_dpo_variants(params: Given, inputs: Given) -> dict[str, Any]:
    conventions(params)
    beta, name = params("beta"), params("objective", among=("sigmoid", "hinge", "ipo", "simpo"))
    free = params("reference_free", False, among=(True, False))
    assert free == (name == "simpo")
    leaf, errors = pair_errors(inputs, inputs.pair("target", WL), WL, not free)
    lp, labels = log_probs(errors, half=params("half", among=(True, False))), first_wins(len(leaf))
    if free:
        ratio = params("gamma") / beta
        value = total(*run(name, lp, labels, beta=beta, gamma_beta_ratio=ratio))
        margin = oriented(lp.mean(), lp, labels)[0] - ratio
    else:
        strength = {"tau": beta, "normalize": "sum"} if name == "ipo" else {"beta": beta}
        value, margin = total(*run(name, lp, labels, **strength)), oriented_margin(lp, labels)[0]
    return {
        "loss": value,
        "grad_model_pred": gradients(value, leaf, WL),
        "logits": margin,
        "implicit_acc": (margin > 0).double().mean(),
        "inside_term": beta * margin,
    }


@adapter("kto")
def diffusion_kto(params: Given, inputs: Given) -> dict[str, Any]:
    """Unpaired: (B, 1, ...). Ranks of one size have the mean of the whole batch in common."""
    conventions(params)
    point = "batch mean of the implicit log-ratio, clamped at 0, no gradient"
    params("reference_point", point, among=(point,))
    assert params("ranks", 1) >= 1
    leaf, target = inputs.tensor("model_pred").requires_grad_(), inputs.tensor("target")
    predictions = {"policy": leaf, "reference": inputs.tensor("ref_pred")}
    errors = {role: denoising_error(p[:, None], target[:, None]) for role, p in predictions.items()}
    lp = log_probs(errors, half=params("half", among=(True, False)))
    labels = {"desirable": inputs.tensor("labels")[:, None]}
    (loss,) = run(
        "kto", lp, labels, beta=params("beta"), desirable_weight=params("lambda_desirable"),
        undesirable_weight=params("lambda_undesirable"),
        utility=params("halo", among=("sigmoid", "loss_averse", "risk_seeking_3")),
    )  # fmt: skip
    ratio, kl = lp.ratio()[:, 0], pointwise.reference_point(lp)
    return {
        "loss": total(loss),
        "grad_model_pred": {"model_pred": torch.autograd.grad(total(loss), leaf)[0]},
        "log_ratio": ratio,
        "kl": kl,
        "log_ratio_minus_kl": ratio - kl,
    }


@adapter("error_ratio")
def diffusion_orpo(params: Given, inputs: Given) -> dict[str, Any]:
    conventions(params)
    leaf, errors = pair_errors(inputs, inputs.pair("target", WL), WL, reference=False)
    lp, labels = log_probs(errors), first_wins(len(leaf))
    sign = params("sign", among=("corrected", "as_published"))
    (loss,) = run("error_ratio", lp, labels, beta=params("beta"), sign=sign)
    gap, _ = oriented(diffusion.errors(lp), lp, labels)
    return {
        "loss": total(loss),
        "grad_model_pred": gradients(total(loss), leaf, WL),
        "log_odds": -gap if sign == "corrected" else gap,
    }


@adapter("mapo")
def mapo(params: Given, inputs: Given) -> dict[str, Any]:
    conventions(params)
    leaf, errors = pair_errors(inputs, inputs.pair("target", WL), WL, reference=False)
    lp, labels = log_probs(errors), first_wins(len(leaf))
    kappa, steps = params("snr_value"), params("num_train_timesteps")
    (loss,) = run("mapo", lp, labels, beta=params("beta_mapo"), snr_value=kappa, timesteps=steps)
    link = reference_free.amplified(kappa * diffusion.errors(lp))
    return {
        "loss": total(loss),
        "grad_model_pred": gradients(total(loss), leaf, WL),
        **split("err_model", diffusion.errors(lp), WL),
        **split("link", link, WL),
        "inside_term": steps * oriented(link, lp, labels)[0],
    }


@adapter("hinge")
def diffusion_dro(params: Given, inputs: Given) -> dict[str, Any]:
    """The expert wins."""
    sides = ("expert", "policy")
    conventions(params)
    params("objective", among=("relu(diff + margin)",))
    margin = params("margin")
    leaf, errors = pair_errors(inputs, inputs.pair("target", sides), sides)
    lp, labels = log_probs(errors), first_wins(len(leaf))
    (loss,) = run("hinge", lp, labels, beta=1.0, margin=margin)
    return {
        "loss": total(loss),
        "grad_model_pred": gradients(total(loss), leaf, sides),
        "diff": -oriented_margin(lp, labels)[0],
        "active": loss.value > 0,
        "loss_paper_form": total(loss) - margin,
    }
