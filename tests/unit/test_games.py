"""Tabular games: what converges, where to, and how fast."""

import pytest
import torch

from diffalign.games import UPDATES, egpo, equilibrium, exploitability, kl, mwu, omd, play

CYCLE = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)
"""Rock, scissors, paper: each beats the next with 0.9."""
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
START = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
START_OF_FIVE = torch.tensor([0.05, 0.1, 0.15, 0.3, 0.4], dtype=torch.float64)
REGULARISED = ("omd", "nash_md", "egpo", "nash_mp")


def random_game(seed: int, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A preference matrix and a reference policy."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.sigmoid(skew - skew.T), torch.randn(n, generator=generator, dtype=torch.float64).softmax(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tau", [0.02, 0.3, 4.0])
def test_the_equilibrium_is_its_own_best_regularised_answer(seed, tau):
    preference, reference = random_game(seed)
    best = equilibrium(preference, reference, tau)
    answer = (reference.log() + preference @ best / tau).softmax(0)
    torch.testing.assert_close(best, answer, rtol=1e-9, atol=1e-12)


def test_the_equilibrium_of_a_symmetric_cycle_is_uniform():
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(equilibrium(CYCLE, uniform, 0.1), uniform)
    with pytest.raises(ValueError, match="positive"):
        equilibrium(CYCLE, uniform, 0.0)


@pytest.mark.parametrize("algorithm", REGULARISED)
def test_the_equilibrium_is_a_fixed_point(algorithm):
    best = equilibrium(CYCLE, REFERENCE, 0.5)
    moved = UPDATES[algorithm](best, CYCLE, REFERENCE, 0.4, 0.5)
    if algorithm == "nash_md":  # its opponent is the mixture, so that it stops close by
        assert 1e-6 < kl(best, moved) < 1e-2
    else:
        torch.testing.assert_close(moved, best, rtol=1e-10, atol=0)


@pytest.mark.parametrize("algorithm", ["omd", "egpo", "nash_mp"])
@pytest.mark.parametrize("seed", range(4))
def test_regularised_methods_contract_to_the_equilibrium(algorithm, seed):
    preference, reference = random_game(seed)
    tau, eta = 0.5, 0.4
    policies = play(preference, reference, START_OF_FIVE, algorithm=algorithm, eta=eta, tau=tau, steps=60)
    distance = kl(equilibrium(preference, reference, tau), policies)
    far = distance > 1e-13
    assert (distance[1:] < distance[:-1])[far[1:]].all()
    assert distance[-1] < 1e-4 * distance[0]


def test_nash_md_ends_beside_the_equilibrium_the_closer_the_smaller_its_steps():
    best = equilibrium(CYCLE, REFERENCE, 0.5)
    ends = [play(CYCLE, REFERENCE, START, algorithm="nash_md", eta=eta, tau=0.5, steps=2000)[-1] for eta in (0.4, 0.04)]
    near, nearer = (kl(best, end).item() for end in ends)
    assert 1e-7 < nearer < near / 20 < kl(best, START).item() / 1000


def test_multiplicative_weights_do_not_converge_in_a_cycle_and_momentum_makes_it_worse():
    settings = {"algorithm": "mwu", "eta": 0.4, "tau": 0.0, "steps": 300}
    plain = exploitability(play(CYCLE, REFERENCE, REFERENCE, **settings), CYCLE)
    fast = exploitability(play(CYCLE, REFERENCE, REFERENCE, **settings, momentum=0.3), CYCLE)
    assert plain[-100:].max() > 1.2 * plain[100:200].max() > 1.4 * plain[:100].max()  # an orbit that widens
    assert fast[4] > plain[4] > plain[0]
    assert fast[100:200].max() > plain[100:200].max()


def test_extragradient_is_at_least_as_good_as_mirror_descent_and_that_as_nash_md():
    best = equilibrium(CYCLE, REFERENCE, 0.5)
    distance = {
        name: kl(best, play(CYCLE, REFERENCE, REFERENCE, algorithm=name, eta=0.4, tau=0.5, steps=40))
        for name in ("egpo", "omd", "nash_md")
    }
    assert (distance["egpo"] < distance["omd"])[:20].all()
    assert (distance["omd"] <= distance["nash_md"] + 1e-12).all()
    assert (distance["omd"] < distance["nash_md"])[1:].all()


def test_large_steps_break_mirror_descent_but_not_extragradient():
    best = equilibrium(CYCLE, REFERENCE, 0.05)
    settings = {"eta": 4.0, "tau": 0.05, "steps": 400}
    assert kl(best, play(CYCLE, REFERENCE, REFERENCE, algorithm="egpo", **settings)[-1]) < 1e-12
    assert kl(best, play(CYCLE, REFERENCE, REFERENCE, algorithm="omd", **settings)[-1]) > 0.1


def test_the_step_without_regularisation_is_multiplicative_weights():
    torch.testing.assert_close(omd(START, CYCLE, REFERENCE, 0.4, 0.0), mwu(START, CYCLE, REFERENCE, 0.4, 0.0))
    torch.testing.assert_close(
        UPDATES["nash_mp"](START, CYCLE, REFERENCE, 0.4, 0.0), egpo(START, CYCLE, REFERENCE, 0.4, 0.0)
    )


def test_no_momentum_changes_nothing_and_the_first_extrapolation_is_from_the_start():
    settings = {"algorithm": "mwu", "eta": 0.4, "tau": 0.0, "steps": 3}
    plain = play(CYCLE, REFERENCE, START, **settings)
    torch.testing.assert_close(play(CYCLE, REFERENCE, START, **settings, momentum=0.0), plain, rtol=0, atol=0)
    first, second, _ = play(CYCLE, REFERENCE, START, **settings, momentum=0.5)
    expected = plain[0] * (plain[0] / START) ** 0.5
    torch.testing.assert_close(first, expected / expected.sum())
    hat = mwu(first, CYCLE, REFERENCE, 0.4, 0.0)
    expected = hat * (hat / plain[0]) ** 0.5  # the update before, not what it was extrapolated to
    torch.testing.assert_close(second, expected / expected.sum())


def test_exploitability_and_divergence_by_hand():
    rock = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert exploitability(rock, CYCLE).item() == pytest.approx(0.4)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert exploitability(torch.stack([rock, uniform]), CYCLE).tolist() == pytest.approx([0.4, 0.0])
    assert kl(rock, uniform).item() == pytest.approx(1.0986122886681098)
    assert kl(uniform, uniform).item() == 0.0
