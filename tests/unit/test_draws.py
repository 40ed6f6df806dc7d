"""What the candidates of a record share, and that a draw is the schedule's."""

import pytest
import torch

from diffalign import draws
from diffalign.errors import UserError
from diffalign.schedule import Discrete, Rectified
from diffalign.types import Batch

from .tiny import Watched


def make(x0: torch.Tensor, schedule=None, seed: int = 0, **options):
    family = Watched({}, schedule or Rectified())
    batch = Batch(x0, {}, {})
    return draws.forward(family, family, batch, torch.Generator().manual_seed(seed), **options)


def noise_of(draw, x0: torch.Tensor) -> torch.Tensor:
    """The noise of a flow draw, from its target ``noise - x0``."""
    return draw.target + x0


@pytest.fixture
def x0() -> torch.Tensor:
    return torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("share_t", [True, False])
@pytest.mark.parametrize("share_noise", [True, False])
def test_candidates_share_what_they_should_and_records_nothing(x0, share_t, share_noise):
    draw = make(x0, share_t=share_t, share_noise=share_noise)
    noise = noise_of(draw, x0)
    assert len(draw.t.unique()) == (4 if share_t else 12)
    assert all(len(row.unique()) == (1 if share_t else 3) for row in draw.t)
    candidates = [noise[:, k] for k in range(3)]
    assert all(torch.allclose(candidates[0], other, atol=1e-5) == share_noise for other in candidates[1:])
    assert not any(torch.allclose(noise[0], noise[b], atol=0.1) for b in range(1, 4))


def test_sharing_is_the_default(x0):
    draw = make(x0)
    explicit = make(x0, share_t=True, share_noise=True)
    assert torch.equal(draw.t, explicit.t)
    assert torch.equal(draw.x_t, explicit.x_t)


@pytest.mark.parametrize("schedule", [Rectified(), Discrete.scaled_linear(prediction="v_prediction")])
def test_a_draw_is_the_schedules_noising(x0, schedule):
    """The target leads back to the data: x_t, target and t belong together for every candidate."""
    draw = make(x0, schedule, share_t=False, share_noise=False)
    assert draw.t.dtype == torch.float32
    torch.testing.assert_close(schedule.denoised(draw.x_t, draw.target, draw.t), x0, rtol=0, atol=1e-5)
    assert not torch.allclose(draw.x_t, x0, atol=0.1)


def test_the_noise_is_standard_normal_and_keeps_frames_apart():
    x0 = torch.zeros(2, 2, 4, 8, 16, 16)
    noise = noise_of(make(x0), x0)
    assert noise.shape == x0.shape
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)
    assert len(noise[:, 0].unique()) > 0.99 * noise[:, 0].numel()


def test_all_randomness_is_the_generators(x0):
    torch.manual_seed(0)
    first = make(x0, seed=5)
    torch.manual_seed(1)
    again, other = make(x0, seed=5), make(x0, seed=6)
    assert torch.equal(first.x_t, again.x_t)
    assert torch.equal(first.t, again.t)
    assert not torch.equal(first.t, other.t)
    assert not torch.equal(noise_of(first, x0), noise_of(other, x0))


def test_density_options_reach_the_schedule(x0):
    schedule = Discrete.scaled_linear()
    index = schedule.native(make(x0.repeat(50, 1, 1, 1, 1), schedule, density={"low": 0.5, "high": 0.6}).t)
    assert int(index.min()) >= 500
    assert int(index.max()) < 600
    with pytest.raises(UserError, match=r"draw\.density has no parameter 'low'"):
        make(x0, density={"low": 0.5})  # a flow has no such option
