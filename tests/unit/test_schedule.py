"""Schedules against their formulas, each other, and the schedulers of diffusers."""

import math

import pytest
import torch

from diffalign.schedule import Discrete, Rectified

EPSILON = Discrete.scaled_linear()
V = Discrete.scaled_linear(prediction="v_prediction")
FLOW = Rectified()
INDICES = [0, 1, 250, 640, 998, 999]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(n: int = len(INDICES), dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and noise, (n, 2, 3, 4, 4)."""
    x0, noise = torch.randn(2, n, 2, 3, 4, 4, generator=generator(), dtype=dtype)
    return x0, noise


def times(schedule) -> torch.Tensor:
    """(6, 2) times, the same for both candidates. A flow's are float64 here, so that only the formula is tested."""
    inside = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    t = inside if schedule is FLOW else EPSILON.unit(torch.tensor(INDICES))
    return t[:, None].expand(-1, 2)


def abar(t: torch.Tensor) -> torch.Tensor:
    return torch.tensor(EPSILON.alphas_cumprod, dtype=torch.float64)[EPSILON.native(t)][..., None, None, None]


# --- clock ------------------------------------------------------------------------------------------------------


def test_unit_time_is_exact_for_every_index():
    indices = torch.arange(1000)
    t = EPSILON.unit(indices)
    assert t.dtype == torch.float32
    assert (t[0], t[-1]) == (0.0, 1.0)
    assert torch.equal(EPSILON.native(t), indices)
    neighbours = torch.nextafter(t, torch.tensor(2.0)), torch.nextafter(t, torch.tensor(-1.0))
    assert all(torch.equal(EPSILON.native(n), indices) for n in neighbours)


@pytest.mark.parametrize("steps", [2, 10, 200, 4000])
def test_other_table_lengths_are_exact_too(steps):
    schedule = Discrete.scaled_linear(steps)
    assert torch.equal(schedule.native(schedule.unit(torch.arange(steps))), torch.arange(steps))


def test_flow_calls_the_network_with_a_thousand_sigma():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert FLOW.native(t).tolist() == [0.0, 250.0, 1000.0]
    assert torch.equal(FLOW.unit(FLOW.native(t)), t)
    assert Rectified(scale=1.0).native(t).tolist() == t.tolist()


# --- parametrisations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EPSILON, V, FLOW], ids=["epsilon", "v", "flow"])
def test_the_target_leads_back_to_the_data(schedule):
    x0, noise = latents()
    t = times(schedule)
    x_t = schedule.add_noise(x0, noise, t)
    clean = schedule.denoised(x_t, schedule.target(x0, noise, t), t)
    torch.testing.assert_close(clean, x0, rtol=0, atol=1e-11)


def test_flow_target_is_the_time_derivative():
    x0, noise = latents()
    t, h = times(FLOW), 1e-3
    slope = (FLOW.add_noise(x0, noise, t + h) - FLOW.add_noise(x0, noise, t - h)) / (2 * h)
    torch.testing.assert_close(FLOW.target(x0, noise, t), slope, rtol=0, atol=1e-9)
    assert torch.equal(FLOW.add_noise(x0, noise, torch.zeros(6, 2)), x0)
    assert torch.equal(FLOW.add_noise(x0, noise, torch.ones(6, 2)), noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_discrete_agrees_with_the_stock_scheduler(prediction):
    from diffusers import DDPMScheduler

    stock = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction)
    ours = Discrete.scaled_linear(prediction=prediction)
    table = torch.tensor(ours.alphas_cumprod, dtype=torch.float64)
    # theirs multiplies a thousand float32 factors
    torch.testing.assert_close(table, stock.alphas_cumprod.double(), rtol=1e-5, atol=0)
    x0, noise = latents(dtype=torch.float32)
    index, t = torch.tensor(INDICES), times(ours)
    torch.testing.assert_close(ours.add_noise(x0, noise, t), stock.add_noise(x0, noise, index), rtol=0, atol=1e-5)
    target = stock.get_velocity(x0, noise, index) if prediction == "v_prediction" else noise
    torch.testing.assert_close(ours.target(x0, noise, t), target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [V, FLOW], ids=["v", "flow"])
def test_errors_relate_to_epsilon_errors_as_published(schedule):
    """``err_eps = abar err_v`` and ``err_eps = (1 - sigma)^2 err_flow``."""
    x0, noise = latents()
    t = times(schedule)
    x_t, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    prediction = target + 0.1 * torch.randn(target.shape, generator=generator(1), dtype=target.dtype)
    clean = schedule.denoised(x_t, prediction, t)
    sigma = t[..., None, None, None]
    signal, level, factor = (1 - sigma, sigma, (1 - sigma) ** 2) if schedule is FLOW else (
        abar(t).sqrt(), (1 - abar(t)).sqrt(), abar(t),
    )  # fmt: skip
    eps = (x_t - signal * clean) / level

    def error(a, b):
        return (a - b).square().mean((2, 3, 4))

    torch.testing.assert_close(error(eps, noise), factor[..., 0, 0, 0] * error(prediction, target), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_levels_survive_half_precision_latents(dtype):
    """1 - abar_0 is 8.5e-4; formed in half precision it would be off by half."""
    one, t = torch.ones(1, 1, 4, dtype=dtype), torch.zeros(1, 1)
    level = EPSILON.add_noise(0 * one, one, t)
    assert level.dtype == dtype
    assert float(level[0, 0, 0]) == pytest.approx(math.sqrt(0.00085), rel=2 * torch.finfo(dtype).eps)


def test_every_candidate_has_its_own_time():
    x0, noise = latents()
    t = torch.stack([EPSILON.unit(torch.tensor(INDICES)), EPSILON.unit(torch.tensor(INDICES[::-1]))], 1)
    both = V.target(x0, noise, t)
    for k in (0, 1):
        alone = V.target(x0[:, k : k + 1], noise[:, k : k + 1], t[:, k : k + 1])
        assert torch.equal(both[:, k : k + 1], alone)


# --- grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 28, 50])
def test_flow_grid_is_the_stock_grid(shift, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(steps)
    ours = Rectified(shift=shift)
    torch.testing.assert_close(ours.grid(steps), stock.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.native(ours.grid(steps)[:-1]), stock.timesteps, rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_a_grid_stretched_to_its_terminal_time_is_the_stock_grid(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=2.0, shift_terminal=0.02)
    stock.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())
    ours = Rectified(shift=2.0, even=True, terminal=0.02)
    torch.testing.assert_close(ours.grid(steps), stock.sigmas, rtol=0, atol=1e-6)
    assert ours.grid(1).tolist() == [1.0, 0.0]
    u = torch.linspace(0, 1, 5)
    assert torch.equal(ours.shifted(u), Rectified(shift=2.0).shifted(u)), "training times are not stretched"


@pytest.mark.parametrize("terminal", [None, 0.02])
def test_a_flow_begins_at_one_to_the_last_bit(terminal):
    """A stochastic step from beside it would have a thousand times the noise."""
    for shift in torch.linspace(1.0, 4.0, 200).tolist():
        for steps in (4, 6, 10):
            assert Rectified(shift=shift, even=True, terminal=terminal).grid(steps)[0] == 1.0


def test_discrete_grid_is_the_stock_trailing_grid():
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear")
    for steps in range(1, 1000):
        stock.set_timesteps(steps)
        grid = EPSILON.grid(steps)
        theirs = stock.timesteps.tolist()[:steps]  # float error gives them an entry -1 too many at 61 steps and others
        assert EPSILON.native(grid[:-1]).tolist() == theirs, f"{steps} steps"
        assert (grid[0], grid[-1]) == (1.0, 0.0)


def test_shift_is_the_published_map():
    u = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(Rectified(shift=3.0).shifted(u), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    assert torch.equal(FLOW.shifted(u), u)


# --- densities --------------------------------------------------------------------------------------------------


def test_discrete_times_are_uniform_on_the_grid():
    n = 400_000
    index = EPSILON.native(EPSILON.sample_t((n, 1), generator()))
    counts = torch.bincount(index[:, 0], minlength=1000).double()
    assert len(counts) == 1000
    assert counts[0] > 0.75 * n / 1000  # 5 standard deviations below the mean
    assert counts[-1] > 0.75 * n / 1000
    chi2 = float((counts - n / 1000).square().sum() / (n / 1000))
    assert abs(chi2 - 999) < 5 * math.sqrt(2 * 999)


def test_discrete_times_stay_in_their_window():
    index = EPSILON.native(EPSILON.sample_t((20_000,), generator(), low=0.2, high=0.8))
    assert (int(index.min()), int(index.max())) == (200, 799)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (1.0, 0.5, 1.0), (0.0, 1.0, 3.0)])
def test_flow_times_have_logit_normal_quantiles(mean, std, shift):
    t = Rectified(shift=shift).sample_t((200_000,), generator(), mean=mean, std=std).double()
    assert float(t.min()) > 0
    assert float(t.max()) < 1
    u = t / (shift - (shift - 1) * t)  # inverse of the shift
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    normal = mean + std * math.sqrt(2) * torch.special.erfinv(2 * levels - 1)
    torch.testing.assert_close(u.logit().quantile(levels), normal, rtol=0, atol=0.02 * std)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize(("least", "shift"), [(0.875, 1.0), (0.875, 12.0), (0.4, 3.0)])
def test_flow_times_from_the_least_on_are_the_part_of_the_density_there(density, least, shift):
    whole = Rectified(shift=shift).sample_t((400_000,), generator(), density=density).double()
    kept = whole[whole >= least]
    part = Rectified(shift=shift, least=least).sample_t((200_000,), generator(1), density=density).double()
    assert part.min() >= least
    levels = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    assert (part.quantile(levels) - kept.quantile(levels)).abs().max() < 0.01 * (1 - least)
    assert torch.equal(Rectified(shift=shift, least=least).grid(5), Rectified(shift=shift).grid(5))


def test_flow_times_can_be_uniform():
    t = FLOW.sample_t((200_000,), generator(), density="uniform")
    levels = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(t.quantile(levels), levels, rtol=0, atol=0.005)


@pytest.mark.parametrize("schedule", [EPSILON, FLOW], ids=["discrete", "flow"])
def test_times_depend_on_the_generator_alone(schedule):
    torch.manual_seed(0)
    first = schedule.sample_t((5, 1), generator(3))
    torch.manual_seed(1)
    assert torch.equal(first, schedule.sample_t((5, 1), generator(3)))
    assert not torch.equal(first, schedule.sample_t((5, 1), generator(4)))
    assert len(first.unique()) == 5
    assert first.dtype == torch.float32


def test_an_unknown_density_is_refused():
    with pytest.raises(ValueError, match="unknown timestep density 'beta'"):
        FLOW.sample_t((1,), generator(), density="beta")
