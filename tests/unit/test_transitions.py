"""Sampling steps as Gaussians, and the draws and estimates that read stored trajectories."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from diffalign import draws, timesteps
from diffalign.errors import UserError
from diffalign.estimate import branches, denoising, transition
from diffalign.methods import resolve
from diffalign.samplers import rollout
from diffalign.schedule import Discrete, Rectified
from diffalign.train.step import loss_step
from diffalign.transitions import FLOW_STEPS, cps, dance, ddim, flow_sde
from diffalign.types import Batch, Draw, SampledPath

from .tiny import Watched

LEVELS = torch.tensor([1.0, 0.86, 0.5, 0.3])
NEXT = torch.tensor([0.96, 0.79, 0.2, 0.0])
STEPS = {"flow_sde": flow_sde, "dance": dance, "cps": cps}


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def v() -> Tensor:
    return normal(4, 2, 3, 3, seed=1)


@pytest.fixture
def x() -> Tensor:
    return normal(4, 2, 3, 3, seed=2)


def test_the_log_prob_is_the_mean_log_density_of_what_was_sampled(v, x):
    step = flow_sde(v.double(), x.double(), LEVELS, NEXT)
    reached = step.sample(normal(4, 2, 3, 3, seed=3, dtype=torch.float64))
    for row in range(4):
        density = torch.distributions.Normal(step.mean[row], step.std[row]).log_prob(reached[row])
        assert step.log_prob(reached)[row].item() == pytest.approx(density.mean().item(), rel=1e-12)


def test_pure_noise_takes_the_second_level_in_its_diffusion(v, x):
    """At s = 1 exactly, s / (1 - s) would be infinite."""
    whole = flow_sde(v, x, LEVELS, NEXT)
    assert whole.mean.isfinite().all()
    assert whole.diffusion[0].item() == pytest.approx(0.7 * math.sqrt(1 / 0.04), rel=1e-5)
    assert flow_sde(v, x, LEVELS, NEXT, second=0.5).diffusion[0].item() == pytest.approx(0.7 * math.sqrt(2), rel=1e-6)
    assert torch.equal(whole.diffusion[1:], flow_sde(v, x, LEVELS, NEXT, second=0.5).diffusion[1:])


@pytest.mark.parametrize("name", ["flow_sde", "dance"])
def test_the_last_step_is_noisy_in_an_sde(name, v, x):
    last = STEPS[name](v, x, LEVELS, NEXT)
    assert last.std[3] > 0.1
    assert last.log_prob(last.mean)[3].isfinite()


def test_the_last_step_of_cps_is_its_clean_estimate(v, x):
    last = cps(v, x, LEVELS, NEXT)
    assert last.std[3] == 0
    reached = last.sample(torch.full_like(x, 100.0))
    torch.testing.assert_close(reached[3], (x - 0.3 * v)[3])
    assert last.log_prob(reached)[3] == 0


def test_a_step_without_noise_has_no_log_prob(v, x):
    """eta = 0, noise level 0, and a step that stays at its level gave NaN."""
    abar = torch.full((4,), 0.5)
    for step in (
        flow_sde(v, x, LEVELS, NEXT, noise_level=0.0),
        dance(v, x, LEVELS, NEXT, noise_level=0.0),
        ddim(v, x, abar, abar + 0.1, noise_level=0.0),
        ddim(v, x, abar, abar),
        ddim(v, x, abar, abar - 0.1),  # the wrong way round
    ):
        with pytest.raises(UserError, match="without noise has no log-prob"):
            step.log_prob(x)


@pytest.mark.parametrize("name", STEPS)
def test_half_precision_is_computed_in_float32(name, v, x):
    half = STEPS[name](v.bfloat16(), x.bfloat16(), LEVELS, NEXT)
    wide = STEPS[name](v.bfloat16().float(), x.bfloat16().float(), LEVELS, NEXT)
    assert half.mean.dtype == torch.float32
    assert torch.equal(half.mean, wide.mean)


def test_small_noise_levels_keep_their_digits_in_float32():
    """1 - abar loses most of its digits near the data unless it is taken in float64."""
    abar, following = torch.tensor([0.9982960224151611]), torch.tensor([0.9991499781608582])
    step = ddim(torch.ones(1, 3), torch.ones(1, 3), abar.double(), following.double())
    assert step.std.item() == pytest.approx(0.020648354325774276, rel=1e-6)


@pytest.mark.parametrize("parametrisation", ["epsilon", "v_prediction", "sample"])
def test_ddim_of_the_true_prediction_keeps_signal_and_noise_power(parametrisation):
    """From x_t of known data and noise: mean and noise together have the next level's marginal."""
    x0, eps = normal(1, 5, seed=4, dtype=torch.float64), normal(1, 5, seed=5, dtype=torch.float64)
    ab, ab_next = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    truth = {"epsilon": eps, "sample": x0, "v_prediction": ab.sqrt() * eps - (1 - ab).sqrt() * x0}
    step = ddim(truth[parametrisation], x_t, ab, ab_next, parametrisation=parametrisation)
    torch.testing.assert_close(step.mean, ab_next.sqrt() * x0 + (1 - ab_next - step.std**2).sqrt() * eps)


# --- stored trajectories


def collected(family: Watched, k: int = 2, steps: int = 5, dtype=torch.float32) -> Batch:
    """Records of K candidates with the path that a flow SDE took under the behaviour policy."""
    tilt = normal(3, 1, seed=7, dtype=dtype)
    rows = {"tilt": tilt.expand(3, k).flatten()}
    noises = iter(normal(steps, 3 * k, 2, 4, seed=8, dtype=dtype))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        with family.use("behaviour") as net:
            return family.predict(net, x, t.expand(len(x)), rows)

    start = normal(3 * k, 2, 4, seed=9, dtype=dtype)
    _, path = rollout(predict, start, Rectified(shift=3.0).grid(steps).to(dtype), flow_sde, noises)
    whole = SampledPath(*(value.unflatten(0, (3, k)) for value in (path.t, path.x, path.prediction)))
    reward = torch.arange(3 * k, dtype=dtype).reshape(3, k)
    labels = {"reward": reward, "advantage": reward - 1.5}
    return Batch(whole.x[:, :, -1], {"tilt": tilt}, labels, path=whole)


def watched(**gains: float) -> Watched:
    return Watched.of(**{"policy": 0.4, "behaviour": 0.4, "reference": 0.35, "average": 0.38, **gains})


def draw_of(family: Watched, batch: Batch, **options):
    return draws.transition(family, family, batch, torch.Generator().manual_seed(0), **options)


def test_a_transition_draw_is_a_stored_step():
    family = watched()
    batch = collected(family)
    draw = draw_of(family, batch, count=3)
    assert batch.path is not None
    for b in range(3):
        for k in range(2):
            for s in range(3):
                j = int((batch.path.t[b, k] == draw.t[b, k, s]).nonzero())
                assert draw.t_prev[b, k, s] == batch.path.t[b, k, j + 1]
                assert torch.equal(draw.x_t[b, k, s], batch.path.x[b, k, j])
                assert torch.equal(draw.x_prev[b, k, s], batch.path.x[b, k, j + 1])
                assert torch.equal(draw.target[b, k, s], batch.path.prediction[b, k, j])
            assert len(draw.t[b, k].unique()) == 3
    assert torch.equal(draw.t[:, 0], draw.t[:, 1])


def test_which_steps_are_drawn():
    family = watched()
    batch = collected(family, k=4, steps=10)
    apart = draw_of(family, batch, count=5, share=False)
    assert not torch.equal(apart.t[:, 0], apart.t[:, 1])
    early = draw_of(family, batch, count=None, fraction=0.99)  # Flow-GRPO: all but the last
    assert early.t.shape == (3, 4, 9)
    assert early.t_prev.min() > 0
    assert draw_of(family, batch, count=None).t_prev.min() == 0


def test_offline_data_have_no_steps():
    family = watched()
    with pytest.raises(UserError, match="trajectories"):
        draw_of(family, Batch(normal(1, 2, 3), {}, {}))


def test_at_unchanged_weights_policy_and_stored_behaviour_agree_to_the_bit():
    """The ratio of the first update after a rollout is exactly one; the behaviour costs no forward."""
    family = watched()
    batch = collected(family)
    family.log.clear()
    lp = transition(family, family, batch, draw_of(family, batch, count=None), ("behaviour", "reference"))
    assert torch.equal(lp.by_role["policy"], lp.by_role["behaviour"])
    assert not lp.gap["behaviour"].any()
    assert lp.gap["reference"].min() > 0
    assert [entry[0] for entry in family.log] == ["reference", "policy"]
    assert lp.by_role["policy"].requires_grad
    assert not lp.by_role["reference"].requires_grad


def test_extra_of_a_transition_is_its_noise_and_length():
    family = watched()
    batch = collected(family)
    draw = draw_of(family, batch, count=None, fraction=0.99)
    extra = transition(family, family, batch, draw, (), kind="dance", noise_level=0.3).extra
    torch.testing.assert_close(extra["diffusion"], torch.full_like(draw.t, 0.3))
    torch.testing.assert_close(extra["std"], 0.3 * (draw.t - draw.t_prev).sqrt())
    assert torch.equal(extra["dt"], draw.t - draw.t_prev)


@pytest.mark.parametrize(("kind", "schedule"), [("ddim", Rectified()), ("cps", Discrete.scaled_linear())])
def test_a_step_that_does_not_fit_the_schedule_is_refused(kind, schedule):
    family = watched()
    batch = collected(family)
    family.schedule = schedule
    with pytest.raises(UserError, match="does not fit the schedule"):
        transition(family, family, batch, draw_of(family, batch), (), kind=kind)


def test_a_discrete_schedule_takes_its_own_levels():
    schedule = Discrete.scaled_linear(prediction="v_prediction")
    family = watched()
    family.schedule = schedule
    table = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    grid = schedule.unit(torch.tensor([981, 481, 1, 0]))
    x, prediction = normal(1, 1, 4, 3, seed=1), normal(1, 1, 3, 3, seed=2)
    batch = Batch(x[:, :, -1], {"tilt": torch.zeros(1, 1)}, {}, path=SampledPath(grid.expand(1, 1, 4), x, prediction))
    draw = draw_of(family, batch, count=None)
    lp = transition(family, family, batch, draw, ("behaviour",), kind="ddim")
    order = draw.t[0, 0].argsort(descending=True)
    for s, (now, following) in zip(order, ((981, 481), (481, 1), (1, 0)), strict=True):
        step = partial(ddim, parametrisation="v_prediction")
        made = step(draw.target[0, :, s], draw.x_t[0, :, s], table[[now]], table[[following]])
        torch.testing.assert_close(lp.by_role["behaviour"][0, :, s], made.log_prob(draw.x_prev[0, :, s]))


# --- repeated times and the branches of NFT


def repeated_of(family: Watched, batch: Batch, seed: int = 0, **options):
    return draws.repeated(family, family, batch, torch.Generator().manual_seed(seed), **options)


def batch_of(*shape: int) -> Batch:
    return Batch(normal(*shape), {"tilt": normal(shape[0], 1, seed=5)}, {"advantage": normal(*shape[:2], seed=6)})


def test_repeated_times_are_units_of_their_own_candidate():
    """Each unit is what a plain draw at that time gives."""
    family = watched()
    batch = batch_of(3, 2, 2, 4)
    draw = repeated_of(family, batch, count=4, kind="permuted")
    lp = denoising(family, family, batch, draw, ("reference",), scale=1.0)
    assert lp.by_role["policy"].shape == lp.extra["t"].shape == lp.gap["reference"].shape == (3, 2, 4)
    assert torch.equal(lp.extra["t"], draw.t)
    for unit in range(4):
        alone = Draw(draw.t[:, :, unit], draw.x_t[:, :, unit], draw.target[:, :, unit])
        one = denoising(family, family, batch, alone, ("reference",), scale=1.0)
        torch.testing.assert_close(lp.by_role["policy"][..., unit], one.by_role["policy"][..., 0])
        torch.testing.assert_close(lp.gap["reference"][..., unit], one.gap["reference"][..., 0])


def test_a_record_shares_its_strata_but_no_noise():
    family = watched()
    batch = batch_of(3, 2, 8, 8)
    draw = repeated_of(family, batch)
    assert draw.t.shape == (3, 2, 6)
    assert (draw.t == draw.t[:, :1]).all()
    assert not torch.equal(draw.t[0], draw.t[1])
    grid = family.schedule.grid(14)
    for unit, (low, high) in enumerate([(1, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]):
        assert all(t in grid[low:high] for t in draw.t[:, 0, unit])
    noise = draw.target + batch.x0[:, :, None]
    assert not torch.allclose(noise[:, :, 0], noise[:, :, 1], atol=0.1)
    torch.testing.assert_close(draw.x_t, batch.x0[:, :, None] + draw.t[..., None, None] * draw.target)


@pytest.mark.parametrize("kind", ["discrete", "discrete_with_init", "uniform", "logit_normal", "permuted"])
def test_times_of_every_kind(kind):
    family = watched()
    t = repeated_of(family, batch_of(3, 2, 4), kind=kind, count=5).t
    assert t.shape == (3, 2, 5)
    assert ((t > 0) & (t <= 1)).all()
    assert len(t[0, 0].unique()) == 5
    assert (kind in ("uniform", "permuted")) == (not torch.equal(t[0, 0], t[0, 1]))
    if kind == "discrete_with_init":
        assert t[0, 0, 0] == 1


@pytest.mark.parametrize("kind", ["discrete", "discrete_wo_init", "discrete_with_init"])
@pytest.mark.parametrize(("count", "levels"), [(6, 12), (4, 9), (1, 5), (5, 7)])
def test_strata_tile_the_trainable_grid(kind, count, levels):
    lower, upper = timesteps.strata(kind, count, levels)
    begin = 0 if kind == "discrete" else 1
    if len(lower):
        assert lower[0] == begin
        assert upper[-1] == levels
        assert torch.equal(lower[1:], upper[:-1])
    almost_one = torch.full((len(lower),), 1 - 1e-7)
    index = timesteps.discrete(kind, count, levels, almost_one)
    assert len(index) == count
    assert index.max() < levels
    assert kind != "discrete_with_init" or index[0] == 0


def test_the_branches_sizes_are_those_of_the_mixed_predictions():
    family, mix = watched(behaviour=0.3), 0.6
    batch = batch_of(2, 3, 2, 4)
    draw = repeated_of(family, batch, count=2, kind="permuted")
    lp = branches(family, family, batch, draw, ("behaviour",), mix=mix)
    base = draw.x_t + draw.t[..., None, None] + batch.cond["tilt"][:, :, None, None, None]
    new, old = 0.4 * base, 0.3 * base
    for name, mixed in (("positive", mix * new + (1 - mix) * old), ("negative", (1 + mix) * old - mix * new)):
        torch.testing.assert_close(lp.extra[name], (mixed - draw.target).abs().mean((3, 4)))
        assert not lp.extra[name].requires_grad
    assert torch.equal(lp.extra["mix"], torch.full((2, 3, 2), mix))


def test_replay_noises_the_expert_and_reads_the_other():
    family = watched()
    batch = collected(family)
    draw = draws.replay(family, family, batch, torch.Generator().manual_seed(1))
    assert batch.path is not None
    assert torch.equal(draw.t[:, 0], draw.t[:, 1])
    for b in range(3):
        j = int((batch.path.t[b, 0] == draw.t[b, 0]).nonzero())  # candidate 1 has the larger reward
        assert torch.equal(draw.x_t[b, 0], batch.path.x[b, 0, j])
        assert torch.equal(draw.target[b, 0], batch.path.prediction[b, 0, j])
        t = draw.t[b, 1]
        torch.testing.assert_close(draw.x_t[b, 1], batch.x0[b, 1] + t * draw.target[b, 1])


# --- rows of the catalogue


def on_policy(name: str, **gains: float) -> tuple[float, Watched]:
    family = watched(**gains)
    batch = collected(family)
    generator = torch.Generator().manual_seed(2)
    result = loss_step(resolve(name), family, family, batch, generator)
    result.loss.backward()
    assert family.gains["policy"].grad is not None
    assert family.gains["policy"].grad.isfinite()
    return result.loss.item(), family


FLOW = ("flow-grpo", "grpo-guard", "dance-grpo", "awm", "awm-released", "diffusion-nft", "diffusion-dro", "dso-dpo")


@pytest.mark.parametrize("name", FLOW)
def test_a_row_steps_and_moves_the_policy(name):
    _, family = on_policy(name)
    assert family.gains["policy"].grad != 0
    assert all(gain.grad is None for role, gain in family.gains.items() if role != "policy")


def test_flow_grpo_on_policy_is_minus_the_mean_advantage_plus_its_penalty():
    batch = collected(watched())
    anchored, _ = on_policy("flow-grpo", reference=0.4)
    assert anchored == pytest.approx(-batch.labels["advantage"].mean().item(), rel=1e-5)
    drifted, _ = on_policy("flow-grpo", reference=0.2)
    assert drifted > anchored


def test_an_objective_that_reads_noise_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="reads 'std'"):
        resolve("awm", objective={"name": "guarded_policy_gradient"})


def test_the_table_of_flow_steps_is_complete():
    assert set(FLOW_STEPS.values()) == {flow_sde, dance, cps}
