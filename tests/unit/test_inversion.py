"""Inversion: the latent is carried to t by the policy, and the target is the noise that leads there."""

import math

import pytest
import torch

from diffalign import draws
from diffalign.errors import UserError
from diffalign.schedule import Discrete, Rectified
from diffalign.types import Batch

from .tiny import Watched


def family_of(schedule, gain: float = 0.4) -> Watched:
    family = Watched.of(policy=gain)
    family.schedule = schedule
    return family


def batch_of(x0: torch.Tensor) -> Batch:
    return Batch(x0, {"tilt": torch.zeros(len(x0), 1)}, {})


def inverted(schedule, x0: torch.Tensor, t: torch.Tensor, steps: int, released: bool = False, gain: float = 0.4):
    family = family_of(schedule, gain)
    return draws.invert(family, family, batch_of(x0), t, steps, released)


@pytest.fixture
def x0() -> torch.Tensor:
    return torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


SCHEDULES = [Rectified(), Discrete.scaled_linear(), Discrete.scaled_linear(prediction="v_prediction")]


@pytest.mark.parametrize(
    ("schedule", "released"),
    [
        (schedule, released)
        for schedule in SCHEDULES
        for released in ([False] if schedule == Rectified() else [False, True])
    ],
)
def test_the_target_belongs_to_the_latent_and_its_time(schedule, released, x0):
    t = Discrete.scaled_linear().unit(torch.tensor([[700], [150], [30]])).expand(3, 2)
    draw = inverted(schedule, x0, t, 5, released)
    assert torch.equal(draw.t, t)
    torch.testing.assert_close(schedule.denoised(draw.x_t, draw.target, t), x0, rtol=0, atol=1e-6)
    assert not torch.allclose(draw.target[:, 0], draw.target[:, 1], atol=0.1)  # candidates have their own
    assert not draw.x_t.requires_grad


def test_it_follows_the_flow_of_the_policy(x0):
    """``dx/dt = gain (x + t)`` has the solution ``(x0 + 1/gain) exp(gain t) - t - 1/gain``."""
    t, gain = torch.tensor([[0.83], [0.5], [0.07]]).expand(3, 2), 0.4
    grown = torch.exp(gain * t.double())[..., None, None, None]
    exact = (x0 + 1 / gain) * grown - t.double()[..., None, None, None] - 1 / gain
    errors = [float((inverted(Rectified(), x0, t, n).x_t - exact).abs().max()) for n in (4, 8, 16, 200)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[3] < 5e-3


def test_a_step_asks_twice_at_its_end_and_takes_the_mean(x0):
    """One step from 0 to t of a flow, by hand."""
    family, t = family_of(Rectified()), torch.full((3, 2), 0.25)
    draw = draws.invert(family, family, batch_of(x0), t, 1)
    first = 0.4 * (x0 + 0.25)
    second = 0.4 * (x0 + 0.25 * first + 0.25)
    torch.testing.assert_close(draw.x_t, x0 + 0.25 * (first + second) / 2, rtol=0, atol=1e-7)
    assert [(role, rows, grad) for role, rows, grad, _ in family.log] == [("policy", 6, False)] * 2


def test_the_last_step_ends_at_t_where_the_release_stops_short(x0):
    """At index 150 of five levels the release has gone to level 1 alone: the latent is nearly clean."""
    schedule = Discrete.scaled_linear()
    t = schedule.unit(torch.tensor([[150]])).expand(3, 2)
    ours, theirs = inverted(schedule, x0, t, 5), inverted(schedule, x0, t, 5, released=True)
    signal, sigma = math.sqrt(schedule.alphas_cumprod[150]), math.sqrt(1 - schedule.alphas_cumprod[150])
    torch.testing.assert_close(ours.target, (ours.x_t - signal * x0) / sigma, rtol=1e-9, atol=1e-9)
    assert float((theirs.x_t - x0).abs().max()) < 0.02
    assert float((ours.x_t - x0).abs().max()) > 0.1
    clean = inverted(schedule, x0, schedule.unit(torch.tensor([[1]])).expand(3, 2), 5, released=True)
    assert torch.equal(clean.x_t, x0)


def test_every_record_has_its_own_time(x0):
    """The release uses the time of the first row for the whole batch."""
    schedule = Discrete.scaled_linear()
    t = schedule.unit(torch.tensor([[40], [990], [420]])).expand(3, 2)
    for released in (False, True):
        whole = inverted(schedule, x0, t, 5, released)
        for row in range(3):
            alone = inverted(schedule, x0[row : row + 1], t[row : row + 1], 5, released)
            torch.testing.assert_close(whole.x_t[row], alone.x_t[0], rtol=1e-12, atol=1e-12)


def test_the_draw_is_of_the_generator_and_the_density(x0):
    family, batch = family_of(Rectified()), batch_of(x0.float())
    draw = draws.inversion(family, family, batch, torch.Generator().manual_seed(4), steps=3)
    again = draws.inversion(family, family, batch, torch.Generator().manual_seed(4), steps=3)
    assert torch.equal(draw.x_t, again.x_t)
    assert draw.x_t.dtype == torch.float32
    assert torch.equal(draw.t[:, 0], draw.t[:, 1])
    assert len(draw.t.unique()) == 3
    with pytest.raises(UserError, match=r"draw\.density has no parameter 'middle'"):
        draws.inversion(family, family, batch, torch.Generator(), density={"middle": 1.0})


def test_the_released_grid_needs_a_discrete_schedule(x0):
    with pytest.raises(UserError, match="discrete schedule"):
        inverted(Rectified(), x0, torch.full((3, 2), 0.5), 5, released=True)
