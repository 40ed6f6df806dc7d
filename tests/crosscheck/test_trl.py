"""Values and gradients of the installed trl for the losses that both have; where trl differs, the test says how."""

import pytest
import torch
from torch import Tensor

from diffalign.registry import find_objective, find_shaping
from diffalign.types import LogProbs

from . import trl_losses

B, U = 5, 7
CHOSEN_FIRST = torch.tensor([[1.0, 0.0]]).expand(B, 2)
F64 = torch.float64


def draw(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference log-probs (B, 2, U), and a mask with ragged ends."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (-scale * torch.rand(B, 2, U, generator=generator, dtype=F64) for _ in range(2))
    lengths = torch.randint(1, U + 1, (B, 2, 1), generator=generator)
    return policy.requires_grad_(), reference, (torch.arange(U) < lengths).to(F64)


def ours(name: str, policy: Tensor, reference: Tensor, mask: Tensor, shaping=None, **params) -> Tensor:
    lp = LogProbs({"policy": policy, "reference": reference}, mask)
    labels = {"reward": CHOSEN_FIRST, "win_prob": CHOSEN_FIRST.to(F64)}
    if shaping is not None:
        shape, settings = shaping
        lp = find_shaping(shape)(lp, labels, **settings)
    losses = find_objective(name)(lp, labels, **params)
    return torch.stack([loss.reduce() for loss in losses]).sum()


def agree(mine: Tensor, theirs: Tensor, policy: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=rtol, atol=1e-12)
    gradients = [torch.autograd.grad(value, policy)[0] for value in (mine, theirs)]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-12)


SAME = {
    "sigmoid": ("sigmoid", {"beta": 0.3}, {"beta": 0.3}),
    "hinge": ("hinge", {"beta": 0.3}, {"beta": 0.3}),
    "exo_pair": ("exo_pair", {"beta": 0.3, "label_smoothing": 0.05}, {"beta": 0.3, "label_smoothing": 0.05}),
    "nca_pair": ("nca_pair", {"beta": 0.3}, {"beta": 0.3}),
    "robust": ("robust", {"beta": 0.3, "flip_rate": 0.1}, {"beta": 0.3, "label_smoothing": 0.1}),
    "bco_pair": ("bco_pair", {"beta": 0.3}, {"beta": 0.3}),
    "apo_zero": ("apo_zero", {"beta": 0.3}, {"beta": 0.3}),
    "apo_down": ("apo_down", {"beta": 0.3}, {"beta": 0.3}),
    "discopop": ("discopop", {"beta": 0.3}, {"beta": 0.3}),
    "ipo": ("ipo", {"tau": 0.2}, {"beta": 0.2}),
    "sft": ("sft", {}, {"beta": 0.1}),
    # trl: always the hard targets, and the sum of the two squares; the release takes half of it
    "sppo_hard": ("sppo", {"eta": 5.0, "variant": "hard", "reduction": "sum"}, {"beta": 0.2}),
}
"""Name in trl -> our objective, our parameters, those of trl."""


@pytest.mark.parametrize("loss_type", SAME)
@pytest.mark.parametrize("seed", [0, 1])
def test_pair_losses(loss_type, seed):
    name, mine, theirs = SAME[loss_type]
    policy, reference, mask = draw(seed)
    expected = trl_losses.dpo(loss_type, policy, reference, mask, **theirs)
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-10  # trl rounds its label smoothing to float32
    agree(ours(name, policy, reference, mask, **mine), expected, policy, rtol)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence"])
def test_divergences(divergence):
    policy, reference, mask = draw(2, scale=0.5)
    mine = ours("sigmoid", policy, reference, mask, ("f_divergence", {"divergence": divergence}), beta=0.4)
    agree(mine, trl_losses.dpo("sigmoid", policy, reference, mask, beta=0.4, f_divergence_type=divergence), policy)


def test_the_alpha_of_trl_is_one_minus_the_paper_s():
    # trl clamps the exponent by a table without float64, and computes it in float32
    drawn = [value.detach().float() for value in draw(3, scale=0.5)]
    policy, reference, mask = drawn[0].requires_grad_(), *drawn[1:]
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    theirs = trl_losses.dpo("sigmoid", policy, reference, mask, beta=0.4, **settings)
    shaping = ("f_divergence", {"divergence": "alpha_divergence", "alpha": 0.7})
    agree(ours("sigmoid", policy, reference, mask, shaping, beta=0.4), theirs, policy, rtol=2e-5)


def test_length_desensitised():
    policy, reference, mask = draw(4)
    mine = ours("sigmoid", policy, reference, mask, ("length_desensitised", {"alpha": 0.3}), beta=0.2)
    agree(mine, trl_losses.dpo("sigmoid", policy, reference, mask, beta=0.2, ld_alpha=0.3), policy)


def test_label_smoothing_of_the_sigmoid_is_ignored_by_trl_and_not_by_us():
    policy, reference, mask = draw()
    smoothed = trl_losses.dpo("sigmoid", policy, reference, mask, beta=0.3, label_smoothing=0.2)
    assert smoothed == trl_losses.dpo("sigmoid", policy, reference, mask, beta=0.3)
    mine = ours("sigmoid", policy, reference, mask, beta=0.3, label_smoothing=0.2)
    assert abs(mine - smoothed) > 1e-2
    one = trl_losses.cpo("sigmoid", policy.sum(-1) - reference.sum(-1), beta=0.3, label_smoothing=0.2).mean()
    full = torch.ones_like(mask)
    agree(ours("sigmoid", policy, reference, full, beta=0.3, label_smoothing=0.2), one, policy)


def test_simpo_takes_the_margin_as_a_ratio_and_adds_no_nll():
    policy, reference, mask = draw(5)
    mean = torch.where(mask > 0, policy, 0.0).sum(-1) / mask.sum(-1)
    theirs = trl_losses.cpo("simpo", mean, beta=2.0, gamma=0.8).mean()
    agree(ours("simpo", policy, reference, mask, beta=2.0, gamma_beta_ratio=0.4), theirs, policy)


def test_orpo_and_its_nll_over_completion_tokens():
    policy, reference, mask = draw(6)  # trl computes in float32
    mean = torch.where(mask > 0, policy, 0.0).sum(-1) / mask.sum(-1)
    theirs = (-mean[:, 0] - trl_losses.orpo_ratio(mean, beta=0.3)).mean()
    agree(ours("orpo", policy, reference, mask, odds_weight=0.3), theirs, policy, rtol=1e-5)


@pytest.mark.parametrize("desirable", [[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
def test_kto(desirable):
    drawn, frozen, mask = (value[:, 0] for value in draw(7))
    policy, mismatched = drawn.detach().requires_grad_(), 3 * torch.rand(B, dtype=F64)
    label = torch.tensor(desirable, dtype=F64)
    theirs = trl_losses.kto(policy, frozen, mask, label, mismatched, beta=0.2, weights=(1.2, 0.7))
    rows = {"policy": policy[:, None], "reference": frozen[:, None]}
    lp = LogProbs(rows, mask[:, None], extra={"mismatched": mismatched[:, None]})
    params = {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    (loss,) = find_objective("kto")(lp, {"desirable": label[:, None]}, **params)
    agree(loss.reduce(), theirs, policy)
