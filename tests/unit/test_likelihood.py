"""Errors, log-probs by role, and the one reduction."""

import pytest
import torch

from diffalign.likelihood import denoising_error
from diffalign.types import LogProbs, Loss


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_an_error_is_a_mean_over_the_latent():
    prediction = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])  # (1, 2, 2)
    target = torch.tensor([[[0.0, 0.0], [0.0, 3.0]]])
    assert denoising_error(prediction, target).tolist() == [[[2.5], [4.5]]]


@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 2, 4, 5, 6), (3, 2, 4, 3, 5, 6)])
def test_an_error_does_not_depend_on_the_resolution(shape):
    """A mean over everything but (B, K): repeating a latent along any axis changes nothing."""
    prediction, target = randn(*shape), randn(*shape, seed=1)
    error = denoising_error(prediction, target)
    assert error.shape == (3, 2, 1)
    for axis in range(2, len(shape)):
        again = denoising_error(prediction.repeat_interleave(2, axis), target.repeat_interleave(2, axis))
        torch.testing.assert_close(again, error, rtol=1e-12, atol=0)


def test_frames_become_units():
    prediction, target = randn(2, 3, 4, 5, 6, 7), randn(2, 3, 4, 5, 6, 7, seed=1)  # (B, K, C, F, H, W)
    error = denoising_error(prediction, target, keep=(-3,))
    assert error.shape == (2, 3, 5)
    frame = denoising_error(prediction[:, :, :, 2], target[:, :, :, 2])
    torch.testing.assert_close(error[..., 2:3], frame, rtol=1e-12, atol=0)
    torch.testing.assert_close(error.mean(-1, keepdim=True), denoising_error(prediction, target), rtol=1e-12, atol=0)
    assert torch.equal(error, denoising_error(prediction, target, keep=(3,)))


def test_an_error_of_scalars_keeps_its_shape():
    assert denoising_error(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [[[1.0]] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_widened_before_the_difference(dtype):
    """At beta 5000 an error difference of 4e-4 moves the logit by 1, which half precision cannot even hold."""
    prediction, target = randn(2, 2, 16, 16, dtype=torch.float32).to(dtype), randn(2, 2, 16, 16, seed=1).float()
    error = denoising_error(prediction, target)
    assert error.dtype == torch.float32
    exact = denoising_error(prediction.double(), target.double())
    torch.testing.assert_close(error.double(), exact, rtol=1e-6, atol=0)


def test_double_precision_does_not_leak_through_float32():
    prediction, target = randn(1, 1, 9), randn(1, 1, 9, seed=1)
    error = denoising_error(prediction, target)
    assert error.dtype == torch.float64
    by_hand = sum((p - t) ** 2 for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))
    assert error.item() == pytest.approx(by_hand / 9, rel=1e-14)


def test_the_gradient_points_away_from_the_target():
    prediction, target = randn(2, 2, 3, 4).requires_grad_(), randn(2, 2, 3, 4, seed=1)
    denoising_error(prediction, target).sum().backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction.detach() - target) / 12, rtol=1e-12, atol=0)


# --- log-probs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def log_probs() -> LogProbs:
    """B = 1, K = 3, U = 3: all units, one unit masked, none left."""
    policy = torch.tensor([[[1.0, 2.0, 4.0]] * 3])
    reference = torch.tensor([[[1.0, 1.0, 1.0]] * 3])
    guide = torch.tensor([[[0.0, 2.0, 8.0]] * 3])
    mask = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    return LogProbs({"policy": policy, "reference": reference, "guide": guide}, mask)


def test_sums_and_means_count_only_their_units(log_probs):
    assert log_probs.sum().tolist() == [[7.0, 5.0, 0.0]]
    torch.testing.assert_close(log_probs.mean(), torch.tensor([[7 / 3, 2.5, 0.0]]))
    assert log_probs.sum("guide").tolist() == [[10.0, 8.0, 0.0]]


def test_the_ratio_is_policy_over_reference(log_probs):
    assert log_probs.ratio().tolist() == [[4.0, 3.0, 0.0]]
    torch.testing.assert_close(log_probs.ratio("mean"), torch.tensor([[4 / 3, 1.5, 0.0]]))
    assert log_probs.ratio(against="guide").tolist() == [[-3.0, -3.0, 0.0]]


# --- reduction ----------------------------------------------------------------------------------------------------


def test_the_reduction_is_a_weighted_mean():
    loss = Loss(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1.0, 3.0, 0.0]))
    assert float(loss.reduce()) == pytest.approx(31 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_weight_at_all_gives_zero_and_a_zero_gradient(dtype):
    value = torch.tensor([3.0, 4.0], dtype=dtype, requires_grad=True)
    total = Loss(value, torch.zeros(2, dtype=dtype)).reduce()
    total.backward()
    assert total.item() == 0.0
    assert value.grad.tolist() == [0.0, 0.0]
