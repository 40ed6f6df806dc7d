"""Guidance inside training forwards: transitions of Stable Diffusion families against two branches written by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign import draws
from diffalign.errors import UserError
from diffalign.estimate import transition
from diffalign.families.base import family_class, load_family
from diffalign.samplers import guided, rollout
from diffalign.schedule import Discrete
from diffalign.transitions import FLOW_STEPS, ddim
from diffalign.types import Batch, Draw, SampledPath
from diffalign.weights import Weights, add_lora

from . import tiny_parts

F64 = torch.float64
PROMPTS = ["a red circle", "a blue square"]
STEPS, GUIDANCE = 4, 3.5


def sd() -> Any:
    """The tiny SD 1 in float64, written by no loader."""
    return family_class("sd")(tiny_parts.sd_pipeline().to(F64), "tiny", torch.device("cpu"))


def sd3(folder) -> Any:
    """The tiny SD3 in float64."""
    family = load_family("sd3", str(folder), "cpu")
    for part in family._parts.values():
        part.double()
    return family


@pytest.fixture(params=["sd", "sd3"])
def family(request, tiny_sd3) -> Any:
    """With a LoRA that is no longer zero, so that policy and reference differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = sd() if request.param == "sd" else sd3(tiny_sd3)
        add_lora(made.net, 2, None, ("to_q", "to_v"))
        made.net.double()
        for parameter in made.net.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.requires_grad else 0.2)
    return made


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def batch_of(family: Any, guidance: float = GUIDANCE) -> Batch:
    """Two candidates per prompt with the path that the guided policy took."""
    cond = family.encode_prompt(PROMPTS)
    flat = {name: value.repeat_interleave(2, 0) for name, value in cond.items()}
    predict = guided(family, family.net, flat, family.unconditional(flat), guidance, family.guidance_interval)
    kind: Callable[..., Any] = FLOW_STEPS["flow_sde"]
    if isinstance(family.schedule, Discrete):
        table = torch.tensor(family.schedule.alphas_cumprod, dtype=F64)

        def kind(v, x, t, after):
            return ddim(v, x, table[family.schedule.native(t)], table[family.schedule.native(after)])

    noise = iter(normal(STEPS, 4, 4, 8, 8, seed=1))
    with torch.no_grad():
        _, path = rollout(predict, normal(4, 4, 8, 8, seed=2), family.schedule.grid(STEPS), kind, noise)
    t, x, prediction = (getattr(path, part).unflatten(0, (2, 2)) for part in ("t", "x", "prediction"))
    return Batch(
        x[:, :, -1], {name: value[:, None] for name, value in cond.items()}, {}, path=SampledPath(t, x, prediction)
    )


def drawn(family: Any, batch: Batch, **options: Any) -> Draw:
    return draws.transition(family, Weights(family.net, lora=True), batch, torch.Generator().manual_seed(3), **options)


def kind_of(family: Any) -> str:
    return "ddim" if isinstance(family.schedule, Discrete) else "flow_sde"


def density(family: Any, prediction: Tensor, x: Tensor, after: Tensor, t: Tensor, t_after: Tensor) -> Tensor:
    """(N,) mean log-density of a stored step, from the formulas of its paper."""
    t, t_after = (value.double()[:, None, None, None] for value in (t, t_after))
    if isinstance(family.schedule, Discrete):
        table = torch.tensor(family.schedule.alphas_cumprod, dtype=F64)
        ab, ab_after = (table[(999 * level).round().long()] for level in (t, t_after))
        std = ((1 - ab_after) / (1 - ab) * (1 - ab / ab_after)).sqrt()
        clean = (x - (1 - ab).sqrt() * prediction) / ab.sqrt()
        mean = ab_after.sqrt() * clean + (1 - ab_after - std**2).sqrt() * prediction
    else:
        d = t - t_after
        g = 0.7 * (t / (1 - torch.where(t == 1, t_after, t))).sqrt()
        std = g * d.sqrt()
        mean = x - d * prediction - d * g**2 / (2 * t) * (x + (1 - t) * prediction)
    each = -((after - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return each.mean((1, 2, 3))


def by_hand(family: Any, batch: Batch, draw: Draw, guidance: float, *, frozen: bool = False) -> Tensor:
    """The policy's (B, K, S) log-probs from two forwards, candidate by candidate."""
    assert draw.t_prev is not None
    assert draw.x_prev is not None
    rows = []
    low, high = family.guidance_interval
    for b in range(2):
        prompts = {"prompt": family.encode_prompt([PROMPTS[b]]), "": family.encode_prompt([""])}
        for k in range(2):
            for s in range(draw.t.shape[2]):
                x, t = draw.x_t[b, k, [s]], draw.t[b, k, [s]]
                with_prompt = family.predict(family.net, x, t, prompts["prompt"])
                without = family.predict(family.net, x, t, prompts[""])
                mixed = (1 - guidance) * (without.detach() if frozen else without) + guidance * with_prompt
                mixed = mixed if low <= float(t) <= high else with_prompt
                rows.append(density(family, mixed, x, draw.x_prev[b, k, [s]], t, draw.t_prev[b, k, [s]]))
    return torch.cat(rows).reshape(draw.t.shape)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def gradients(family: Any, value: Tensor) -> list[Tensor]:
    """Of a sum with unequal weights by every LoRA matrix."""
    weights = torch.arange(1, value.numel() + 1, dtype=F64).reshape(value.shape).cos()
    return list(torch.autograd.grad((weights * value).sum(), Weights(family.net, lora=True).trainable()))


@pytest.mark.parametrize("frozen", [False, True])
def test_both_roles_are_guided_and_gradient_flows_as_asked(family, frozen):
    batch = batch_of(family)
    draw, weights = drawn(family, batch, count=2), Weights(family.net, lora=True)
    options = {"kind": kind_of(family), "guidance": GUIDANCE, "detach_uncond": frozen}
    lp = transition(family, weights, batch, draw, ("reference", "behaviour"), **options)
    expected = by_hand(family, batch, draw, GUIDANCE, frozen=frozen)
    close(lp.by_role["policy"], expected)
    found, wanted = gradients(family, lp.by_role["policy"]), gradients(family, expected)
    close(found, wanted)
    other = gradients(family, by_hand(family, batch, draw, GUIDANCE, frozen=not frozen))
    assert any((one - two).abs().max() > 1e-3 * two.abs().max() for one, two in zip(found, other, strict=True))
    close(lp.by_role["behaviour"], expected.detach())  # guidance of the rollout, at unchanged weights
    assert lp.gap["behaviour"].detach().abs().max() < 1e-16
    with weights.use("reference"), torch.no_grad():
        close(lp.by_role["reference"], by_hand(family, batch, draw, GUIDANCE))
    assert not lp.by_role["reference"].requires_grad


def test_guidance_1_costs_one_branch(family):
    batch = batch_of(family, 1.0)
    draw, weights, rows = drawn(family, batch, count=2), Weights(family.net, lora=True), []
    handle = family.net.register_forward_hook(lambda net, args, output: rows.append(len(output[0])))
    alone, both = (
        transition(family, weights, batch, draw, ("reference",), kind=kind_of(family), guidance=guidance)
        for guidance in (1.0, 2.0)
    )
    handle.remove()
    assert rows == [8, 8, 16, 16]
    close(alone.by_role["policy"], by_hand(family, batch, draw, 1.0))
    assert (alone.by_role["policy"] - both.by_role["policy"]).abs().min() > 1e-6


def test_guidance_acts_within_the_interval_of_each_row(family):
    family.guidance_interval = (0.0, 0.8)
    batch = batch_of(family)
    draw = drawn(family, batch, count=2, share=False)
    inside = draw.t <= 0.8
    assert inside.any()
    assert not inside.all()
    options = {"kind": kind_of(family), "guidance": GUIDANCE}
    lp = transition(family, Weights(family.net, lora=True), batch, draw, ("behaviour",), **options)
    expected = by_hand(family, batch, draw, GUIDANCE)
    close(lp.by_role["policy"], expected)
    close(gradients(family, lp.by_role["policy"]), gradients(family, expected))
    close(lp.by_role["behaviour"], expected.detach())  # sampled step by step, by the same rule
    plain = by_hand(family, batch, draw, 1.0)
    close(lp.by_role["policy"][~inside], plain[~inside])
    assert ((lp.by_role["policy"] - plain)[inside].abs() > 1e-6).all()


def test_without_its_encoders_a_family_says_so(family):
    batch = batch_of(family)
    draw, weights = drawn(family, batch), Weights(family.net, lora=True)
    family.release()
    transition(family, weights, batch, draw, (), kind=kind_of(family))
    with pytest.raises(UserError, match="has given back its text encoders"):
        transition(family, weights, batch, draw, (), kind=kind_of(family), guidance=GUIDANCE)
