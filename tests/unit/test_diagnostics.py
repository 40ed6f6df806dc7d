"""Over-optimisation diagnostics: limits, unbiasedness, the shape of the curve."""

import math

import pytest
import torch

from diffalign.diagnostics import best_sqrt_kl, kl_estimates, predicted_gain, top_k


def test_uniform_tokens_have_the_entropy_of_k():
    found = top_k(torch.zeros(3, 40), 8)
    assert found.mass.tolist() == pytest.approx([0.2] * 3)
    assert found.entropy.tolist() == pytest.approx([3.0] * 3)
    assert found.entropy_unnormalized.tolist() == pytest.approx([0.2 * math.log2(40)] * 3)


def test_a_certain_token_has_no_entropy_and_a_small_vocabulary_counts_whole():
    logits = torch.full((5,), -torch.inf)
    logits[2] = 0.0
    found = top_k(logits, 10)
    assert (found.mass.item(), found.entropy.item(), found.entropy_unnormalized.item()) == (1.0, 0.0, 0.0)
    spread = top_k(torch.randn(6, generator=torch.Generator().manual_seed(0)))
    assert spread.mass.item() == pytest.approx(1.0)
    assert spread.entropy.item() == pytest.approx(spread.entropy_unnormalized.item())


def test_renormalising_divides_by_the_mass():
    probability = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1])
    found = top_k(probability.log(), 2)
    shares = [2 / 3, 1 / 3]
    assert found.entropy.item() == pytest.approx(-sum(p * math.log2(p) for p in shares), rel=1e-6)
    assert found.mass.item() == pytest.approx(0.6)


def categorical(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    policy = (reference + shift * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
    return policy, reference


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    policy, reference = categorical(1.0)
    exact = (policy.exp() * (policy - reference)).sum().item()
    counts = (policy.exp() * 200_000).round().long()  # a sample with exactly the policy's frequencies
    found = kl_estimates(policy.repeat_interleave(counts), reference.repeat_interleave(counts))
    assert found.k1.item() == pytest.approx(exact, rel=1e-3)
    assert found.k3.item() == pytest.approx(exact, rel=1e-3)
    assert abs(found.k2.item() - exact) > 0.02 * exact


def test_all_three_agree_close_to_the_reference():
    policy, reference = categorical(1e-3)
    exact = (policy.exp() * (policy - reference)).sum().item()
    counts = (policy.exp() * 2_000_000).round().long()
    found = kl_estimates(policy.repeat_interleave(counts), reference.repeat_interleave(counts))
    assert found.k2.item() == pytest.approx(exact, rel=1e-2)
    assert found.k3.item() == pytest.approx(exact, rel=1e-2)


def test_they_are_zero_at_the_reference_and_k3_is_never_negative():
    log_prob = torch.randn(5, 4)
    assert [value.item() for value in kl_estimates(log_prob, log_prob)] == [0.0, 0.0, 0.0]
    less_likely = kl_estimates(torch.tensor([-2.0]), torch.tensor([-1.0]))
    assert less_likely.k1.item() == -1.0
    assert less_likely.k3.item() == pytest.approx(math.e - 2)


def test_the_curve_rises_to_its_best_and_falls_after():
    best = best_sqrt_kl(0.6, 0.15)
    assert best == pytest.approx(math.exp(3))
    around = predicted_gain(torch.tensor([0.9 * best, best, 1.1 * best]).double() ** 2, 0.6, 0.15)
    assert around[1] > around[0]
    assert around[1] > around[2]
    assert around[1].item() == pytest.approx(0.15 * best)  # beta d at the top
    assert predicted_gain(torch.zeros(1), 0.6, 0.15).item() == 0.0
