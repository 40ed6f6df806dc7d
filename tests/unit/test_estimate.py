"""Roles on one draw: order, one forward, alignment of rows, scale, units, and where gradient may flow."""

from contextlib import contextmanager

import pytest
import torch

from diffalign import draws
from diffalign.estimate import denoising
from diffalign.types import Batch, Draw
from diffalign.weights import Weights

from . import tiny
from .tiny import Watched

ROLES = ("reference", "guide")


def watched() -> Watched:
    return Watched.of(policy=0.9, reference=0.7, guide=-0.2)


def batch_of(*shape: int, shared_condition: bool = True, mask=None) -> Batch:
    """(B, K, ...) latents and a scalar condition per record or per candidate."""
    generator = torch.Generator().manual_seed(0)
    tilt = torch.randn(shape[0], 1 if shared_condition else shape[1], generator=generator)
    return Batch(torch.randn(shape, generator=generator), {"tilt": tilt}, {}, mask)


def draw_of(family, batch: Batch, **options) -> Draw:
    return draws.forward(family, family, batch, torch.Generator().manual_seed(1), **options)


def expected(family: Watched, batch: Batch, draw: Draw, role: str) -> torch.Tensor:
    """Squared errors (B, K, ...) of a role, one candidate at a time."""
    b, k = draw.x_t.shape[:2]
    out = torch.empty_like(draw.x_t)
    for i in range(b):
        for j in range(k):
            tilt = batch.cond["tilt"][i, min(j, batch.cond["tilt"].shape[1] - 1)]
            prediction = family.gains[role].detach() * (draw.x_t[i, j] + draw.t[i, j] + tilt)
            out[i, j] = (prediction - draw.target[i, j]).square()
    return out


def test_frozen_roles_run_first_without_graph_and_all_candidates_at_once():
    family, batch = watched(), batch_of(3, 4, 2, 5, 5)
    denoising(family, family, batch, draw_of(family, batch), ROLES)
    assert [entry[:3] for entry in family.log] == [
        ("reference", 12, False),
        ("guide", 12, False),
        ("policy", 12, True),
    ]


def test_no_role_stays_switched_on_when_a_forward_fails():
    family, batch = watched(), batch_of(1, 2, 3)
    draw = draw_of(family, batch)
    broken = Batch(batch.x0, {}, {})
    with pytest.raises(KeyError):
        denoising(family, family, broken, draw, ROLES)
    assert family.playing == []
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("shared_condition", [True, False])
def test_rows_keep_their_time_condition_and_target(shared_condition):
    family, batch = watched(), batch_of(3, 4, 2, 5, 5, shared_condition=shared_condition)
    draw = draw_of(family, batch, share_t=False, share_noise=False)
    lp = denoising(family, family, batch, draw, ROLES)
    for role in ("policy", *ROLES):
        error = expected(family, batch, draw, role).mean((2, 3, 4))[..., None]
        torch.testing.assert_close(lp.by_role[role].detach(), -0.5 * error, rtol=1e-5, atol=1e-6)
    assert lp.mask.tolist() == torch.ones(3, 4, 1).tolist()


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_scale_is_the_price_of_an_error(scale):
    family, batch = watched(), batch_of(2, 2, 6)
    draw = draw_of(family, batch)
    unit = denoising(family, family, batch, draw, ("reference",), scale=1.0)
    lp = denoising(family, family, batch, draw, ("reference",), scale=scale)
    assert lp.scale == scale
    assert (lp.by_role["policy"] < 0).all()
    for role in ("policy", "reference"):
        torch.testing.assert_close(lp.by_role[role], scale * unit.by_role[role])
    assert torch.equal(lp.gap["reference"], unit.gap["reference"])  # a distance of predictions, not a log-prob


def test_frames_become_units_and_masks_follow():
    mask = torch.tensor([[[1.0], [1.0]], [[1.0], [0.0]]])
    family, batch = watched(), batch_of(2, 2, 3, 5, 4, 4, mask=mask)
    draw = draw_of(family, batch)
    lp = denoising(family, family, batch, draw, ("reference",), frames=True)
    error = expected(family, batch, draw, "policy").mean((2, 4, 5))
    torch.testing.assert_close(lp.by_role["policy"].detach(), -0.5 * error, rtol=1e-5, atol=1e-6)
    assert lp.mask.tolist() == mask.expand(2, 2, 5).tolist()
    whole = denoising(family, family, batch, draw, ("reference",))
    torch.testing.assert_close(lp.mean().detach() * mask[..., 0], whole.sum().detach())


def test_gradient_reaches_the_policy_alone():
    family, batch = watched(), batch_of(2, 2, 6)
    lp = denoising(family, family, batch, draw_of(family, batch), ROLES)
    assert [role for role, value in lp.by_role.items() if value.requires_grad] == ["policy"]
    assert set(lp.gap) == set(ROLES)
    assert lp.gap["reference"].requires_grad  # a regulariser may use it
    lp.ratio().sum().backward()
    assert family.gains["policy"].grad != 0.0
    assert family.gains["reference"].grad is None
    assert family.gains["guide"].grad is None


def test_every_role_has_its_own_and_the_same_precision_context():
    family, batch = watched(), batch_of(1, 2, 6)
    opened = []

    @contextmanager
    def autocast():
        opened.append(list(family.playing))
        with torch.autocast("cpu", torch.bfloat16):
            yield

    lp = denoising(family, family, batch, draw_of(family, batch), ROLES, autocast=autocast)
    assert opened == [["reference"], ["guide"], ["policy"]]
    assert [entry[3] for entry in family.log] == [True, True, True]
    assert lp.by_role["policy"].dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_without_a_reference_there_is_no_gap():
    family, batch = watched(), batch_of(1, 2, 6)
    lp = denoising(family, family, batch, draw_of(family, batch), ())
    assert list(lp.by_role) == ["policy"]
    assert lp.gap == {}


# --- a real network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
def test_roles_agree_to_the_bit_until_training_begins(lora):
    net = tiny.with_lora() if lora else tiny.transformer()
    family, weights, batch = tiny.Family(net), Weights(net, lora=lora), tiny.pairs()
    weights.prepare(("reference",))
    draw = draws.forward(family, weights, batch, torch.Generator().manual_seed(1))
    lp = denoising(family, weights, batch, draw, ("reference",))
    assert torch.equal(lp.by_role["policy"], lp.by_role["reference"])
    assert torch.equal(lp.gap["reference"], torch.zeros(3, 2, 1))
    tiny.perturb(net)
    moved = denoising(family, weights, batch, draw, ("reference",))
    assert torch.equal(moved.by_role["reference"], lp.by_role["reference"])
    assert (moved.by_role["policy"] - moved.by_role["reference"]).abs().min() > 1e-4
    assert (moved.gap["reference"] > 0).all()


def test_the_gradient_trains_the_lora_and_nothing_else():
    net = tiny.with_lora()
    family, weights, batch = tiny.Family(net), Weights(net, lora=True), tiny.pairs()
    draw = draws.forward(family, weights, batch, torch.Generator().manual_seed(1))
    ratio = denoising(family, weights, batch, draw, ("reference",)).ratio()
    (ratio[:, 0] - ratio[:, 1]).sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in net.named_parameters() if "lora_" in name}
    # B starts at zero, so A's gradient is zero and B's is not
    assert any(p.grad.any() for name, p in net.named_parameters() if "lora_B" in name)
    assert not any(p.grad.any() for name, p in net.named_parameters() if "lora_A" in name)
