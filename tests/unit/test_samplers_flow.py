"""Solvers and stochastic steps against data whose velocity is known: N(0, s0^2) under a rectified flow."""

from functools import partial

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.samplers import SAMPLERS, dpm2, euler, guided, rollout, sa_grid, sa_solver
from diffalign.schedule import Rectified
from diffalign.transitions import FLOW_STEPS

SPREAD = 0.5


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return (t - (1 - t) * SPREAD**2) / ((1 - t) ** 2 * SPREAD**2 + t**2) * x


def grid_of(steps: int) -> Tensor:
    """Shift 3, in float64 so that many steps do not drown in rounding."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 3 * u / (1 + 2 * u)


def spread_of(step: str, noise_level: float, grid: Tensor) -> float:
    """The exact standard deviation of the samples: every step is linear in x and in its own noise.

    Column 0 carries the start and column i the noise of step i, all of variance one.
    """
    steps = len(grid) - 1
    basis = torch.eye(steps + 1, dtype=torch.float64)
    _, path = rollout(
        velocity, basis[:1], grid, partial(FLOW_STEPS[step], noise_level=noise_level), iter(basis[1:, None])
    )
    return path.x[0, -1].square().sum().sqrt().item()


@pytest.mark.parametrize(
    ("step", "level", "at_50", "at_200"),
    [("flow_sde", 0.7, 0.482, 0.496), ("dance", 0.3, 0.474, 0.493)],
)
def test_stochastic_steps_converge_to_the_datas_spread(step, level, at_50, at_200):
    few, many = (spread_of(step, level, grid_of(n)) for n in (50, 200))
    assert few == pytest.approx(at_50, abs=0.02)
    assert many == pytest.approx(at_200, abs=0.01)
    assert abs(many - SPREAD) < abs(few - SPREAD)
    assert spread_of(step, level, grid_of(1000)) == pytest.approx(SPREAD, abs=0.004)


def test_coefficient_preserving_steps_do_not_converge():
    """A documented limit: their noise does not shrink with the step."""
    few, many = (spread_of("cps", 0.8, grid_of(n)) for n in (200, 1000))
    assert few == pytest.approx(0.394, abs=0.01)
    assert many == pytest.approx(0.401, abs=0.01)


def error(sampler, steps: int, first: float = 1.0) -> float:
    """Distance of the ODE's end from the exact one, ``s0 x`` (from 1, where the marginal is N(0, 1))."""
    grid = grid_of(steps)
    grid[0] = first
    x = torch.ones(1, 1, dtype=torch.float64) * ((1 - first) ** 2 * SPREAD**2 + first**2) ** 0.5
    return abs(sampler(velocity, x, grid).item() - SPREAD)


def test_orders_of_convergence():
    assert error(euler, 40) / error(euler, 80) == pytest.approx(2, rel=0.15)
    assert error(dpm2, 160) / error(dpm2, 320) > 3
    assert error(dpm2, 160) < error(euler, 160) / 5


@pytest.mark.parametrize(("predictor", "corrector", "gain"), [(1, 0, 1.9), (2, 0, 2.7), (2, 2, 3.3), (3, 3, 5.0)])
def test_sa_solver_without_noise_is_an_ode_solver(predictor, corrector, gain):
    """What halving the steps gains; it nears two to the order as steps are added."""
    solver = partial(sa_solver, predictor_order=predictor, corrector_order=corrector)
    coarse, fine = (error(solver, n, first=0.999) for n in (80, 160))
    assert coarse / fine > gain
    assert fine < 0.01


def test_sa_solver_of_first_order_is_euler():
    grid = sa_grid(grid_of(12))
    x = torch.ones(1, 3, dtype=torch.float64)
    found = sa_solver(velocity, x, grid, predictor_order=1, corrector_order=0)
    torch.testing.assert_close(found, euler(velocity, x, grid), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_sa_solver_with_noise_keeps_the_datas_spread(tau):
    """Linear in start and noises, as above; everywhere stochastic, which the released interval is not."""
    spreads = []
    for steps in (100, 400):
        grid = grid_of(steps)
        grid[0] = 0.9999
        basis = torch.eye(steps, dtype=torch.float64)
        noise = iter(basis[1:, None])
        out = sa_solver(velocity, basis[:1], grid, tau=tau, interval=(0.0, 1.0), noise=noise)
        spreads.append(out.square().sum().sqrt().item())
        assert next(noise, None) is None  # one per step but the last
    assert spreads[1] == pytest.approx(SPREAD, abs=0.01)
    assert abs(spreads[1] - SPREAD) < abs(spreads[0] - SPREAD)


def test_sa_solver_draws_noise_only_within_its_interval():
    grid = sa_grid(grid_of(10))
    inside = int(((grid[1:-1] >= 0.3) & (grid[1:-1] <= 0.9)).sum())
    basis = torch.eye(10, dtype=torch.float64)
    out = sa_solver(velocity, basis[:1], grid, tau=0.4, noise=iter(basis[1:, None]))
    assert int((out[0, 1:] != 0).sum()) == inside


def test_sa_solver_calls_the_network_once_per_step():
    times: list[float] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.item())
        return velocity(x, t)

    grid = sa_grid(grid_of(14))
    sa_solver(predict, torch.ones(1, 1, dtype=torch.float64), grid)
    assert times == grid[:-1].tolist()


def test_what_sa_solver_refuses():
    x = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(UserError, match="below 1"):
        sa_solver(velocity, x, grid_of(10))
    with pytest.raises(UserError, match="at least 3 steps"):
        sa_solver(velocity, x, sa_grid(grid_of(2)), predictor_order=3)
    with pytest.raises(UserError, match=r"at least 2 steps, got 0\.999 and 1"):
        SAMPLERS["sa_solver"](velocity, x, grid_of(1))
    with pytest.raises(ValueError, match="needs noise"):
        sa_solver(velocity, x, sa_grid(grid_of(10)), tau=0.4)


def test_the_released_edits_of_the_grid():
    grid = Rectified(shift=3.0).grid(14)
    edited = sa_grid(grid)
    assert edited[0] == pytest.approx(0.999)
    assert edited[-2] == edited[-3] / 2
    assert torch.equal(edited[1:-2], grid[1:-2])
    assert grid[0] == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_on_the_schedules_grid(name):
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    out = SAMPLERS[name](velocity, x, Rectified(shift=3.0).grid(28))
    assert out.dtype == x.dtype
    torch.testing.assert_close(out, SPREAD * x, rtol=0.2, atol=0)


def test_states_and_paths_hold_every_step():
    grid, x = grid_of(6), torch.ones(2, 3, dtype=torch.float64)
    states: list[Tensor] = []
    last = dpm2(velocity, x, grid, states=states)
    assert len(states) == 7
    assert states[0] is x
    assert torch.equal(states[-1], last)
    _, path = rollout(velocity, x, grid, FLOW_STEPS["flow_sde"], iter(torch.zeros(6, 2, 3, dtype=torch.float64)))
    assert path.x.shape == (2, 7, 3)
    assert path.t.shape == (2, 7)
    for step in range(6):
        assert torch.equal(path.prediction[:, step], velocity(path.x[:, step], grid[step]))


class Line:
    """A family whose prediction is its condition; it notes how many rows it is asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def predict(self, net: object, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.rows.append(len(x))
        return cond["value"].expand_as(x)

    def rescale(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        return guided


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.5, 1.0), (0.3, 0.75)])
def test_guidance_acts_within_its_interval_only(interval):
    line = Line()
    cond, empty = {"value": torch.tensor([[3.0]])}, {"value": torch.tensor([[1.0]])}
    predict = guided(line, torch.nn.Identity(), cond, empty, 4.0, interval)
    times = [0.1, 0.3, 0.5, 0.75, 0.9, 1.0]
    found = [predict(torch.zeros(1, 1), torch.tensor(t)).item() for t in times]
    acts = [interval[0] <= t <= interval[1] for t in times]
    assert found == [1 + 4 * 2 if act else 3.0 for act in acts]
    assert line.rows == [2 if act else 1 for act in acts]


def test_rows_at_times_of_their_own_are_guided_within_the_interval():
    line, times = Line(), torch.tensor([0.1, 0.3, 0.75, 0.9])
    cond, empty = ({"value": torch.full((4, 1), value)} for value in (3.0, 1.0))
    predict = guided(line, torch.nn.Identity(), cond, empty, 4.0, (0.3, 0.75))
    assert predict(torch.zeros(4, 1), times)[:, 0].tolist() == [3.0, 9.0, 9.0, 3.0]
    assert predict(torch.zeros(4, 1), 0.1 * times)[:, 0].tolist() == [3.0] * 4
    assert line.rows == [8, 4]
