"""From a case of a golden file to the values the library computes for it. One adapter per method, named like its file.

An adapter holds no formula of its own: it places the inputs in :class:`LogProbs` through the schedule and the
likelihood, calls the registered objective and lets :class:`Loss` reduce. Everything is float64.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.likelihood import denoising_error
from diffalign.objectives.pair import oriented_margin
from diffalign.registry import find_objective
from diffalign.schedule import Discrete, Rectified
from diffalign.train.step import preference_metrics
from diffalign.types import LogProbs

ADAPTERS: dict[str, Callable[["Given", "Given"], dict[str, Any]]] = {}
OBJECTIVES_OF: dict[str, tuple[str, ...]] = {}
"""Method -> the objectives whose numbers its file pins."""

_REQUIRED = object()


class Given:
    """Parameters or inputs of a case. Whatever the adapter never asked for is left in ``unread``, which is an error."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self.unread = set(values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __call__(self, name: str, default: Any = _REQUIRED, *, among: tuple[Any, ...] | None = None) -> Any:
        """A value by name; ``among`` lists the values the adapter implements."""
        assert name in self._values or default is not _REQUIRED, f"the case lacks {name!r}"
        self.unread.discard(name)
        value = self._values.get(name, default)
        assert among is None or value in among, f"{name}: unknown value {value!r}"
        return value

    def tensor(self, name: str) -> Tensor:
        """An input in float64."""
        return torch.tensor(self(name), dtype=torch.float64)

    def pair(self, name: str, sides: tuple[str, str]) -> Tensor:
        """``name_<side>`` of both sides as (B, 2, ...), or ``name`` itself where both share it."""
        if name in self:
            return self.tensor(name)[:, None].expand(-1, 2, *[-1] * (self.tensor(name).ndim - 1))
        return torch.stack([self.tensor(f"{name}_{side}") for side in sides], 1)


def adapter(*objectives: str) -> Callable:
    """Register an adapter under its function's name, with the objectives it goes through."""

    def register(fn: Callable[[Given, Given], dict[str, Any]]) -> Callable[[Given, Given], dict[str, Any]]:
        ADAPTERS[fn.__name__] = fn
        OBJECTIVES_OF[fn.__name__] = objectives
        return fn

    return register


def split(name: str, values: Tensor, sides: tuple[str, str]) -> dict[str, Tensor]:
    """(B, 2, ...) -> ``name_<side>`` each (B, ...)."""
    return {f"{name}_{side}": values[:, index] for index, side in enumerate(sides)}


def _discrete(params: Given, inputs: Given, prediction: str) -> tuple[Discrete, Tensor]:
    """The DDPM schedule of a case and its times (B,); where a table and ``alpha_bar`` are both given, they agree."""
    if "schedule" in params or "alpha_bar" not in inputs:
        given = Given(params("schedule", {"type": "scaled_linear"}))
        given("type", among=("scaled_linear",))
        steps, start, end = given("num_train_timesteps", 1000), given("beta_start", 0.00085), given("beta_end", 0.012)
        assert not given.unread, f"schedule: unknown {sorted(given.unread)}"
        schedule = Discrete.scaled_linear(steps, start, end, prediction)
        index = torch.tensor(inputs("timesteps"))
    else:
        inputs("timesteps", None)  # the levels themselves are given; one more, since a table of one has no unit time
        schedule = Discrete((*inputs("alpha_bar"), 0.5), prediction)
        index = torch.arange(len(inputs("alpha_bar")))
    if "alpha_bar" in inputs:
        levels = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)[index]
        torch.testing.assert_close(levels, inputs.tensor("alpha_bar"), rtol=1e-12, atol=0)
    return schedule, schedule.unit(index)


def _draw(params: Given, inputs: Given, sides: tuple[str, str]) -> tuple[Tensor | None, Tensor, dict[str, Any]]:
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
    if f"latents_{sides[0]}" not in inputs:
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
    """Spec, section 1: pairs, oriented by reward, in the network's own parametrisation."""
    sides = ("0", "1") if "model_pred_0" in inputs else ("w", "l")
    params("err_reduction", among=("mean",))
    t, target, made = _draw(params, inputs, sides)
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
    loss = find_objective(params("objective", among=("sigmoid",)))(lp, labels, beta=beta)
    total = loss.reduce()
    (gradient,) = torch.autograd.grad(total, policy)

    kept = loss.weight > 0
    margin, _ = oriented_margin(lp, labels)
    order = labels["reward"].argsort(dim=1, descending=True, stable=True)
    oriented = {role: error[..., 0].gather(1, order) for role, error in errors.items()}
    return {
        **made,
        "loss": total,
        "grad_model_pred": split("model_pred", gradient, sides),
        **split("err_model", oriented["policy"], ("w", "l")),
        **split("err_ref", oriented["reference"], ("w", "l")),
        "inside_term": beta * margin,
        "implicit_acc": (margin > 0)[kept].double().mean(),
        "implicit_acc_ties_half": preference_metrics(lp, labels, beta)["reward/accuracy"],
        "beta_t": beta * strength[:, 0, 0],
        "kept": kept,
    }
