"""What to watch for over-optimisation. Nothing here trains; everything is computed in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """Of the k most probable next tokens at each position, (...)."""

    mass: Tensor
    """Their total probability."""
    entropy: Tensor
    """In bits, after renormalising them to 1."""
    entropy_unnormalized: Tensor
    """``-sum p log2 p`` of their probabilities as they are."""


def top_k(logits: Tensor, k: int = 10) -> TopK:
    """Likelihood over-optimisation (arXiv:2410.11677): falling mass, or an entropy that turns from rising to falling.

    Args:
        logits: (..., V).
        k: 10 in the paper, which leaves open whether the k are renormalised; both are given.
    """
    log_prob = logits.double().log_softmax(-1).topk(min(k, logits.shape[-1]), -1).values
    probability = log_prob.exp()
    mass = probability.sum(-1)
    plain = -torch.where(probability > 0, probability * log_prob, 0.0).sum(-1) / math.log(2)
    return TopK(mass, plain / mass + mass.log2(), plain)


class KL(NamedTuple):
    """Estimates of KL(policy || reference) from the policy's samples, each a mean over them."""

    k1: Tensor
    """``mean(-r)`` with ``r = log reference - log policy``: unbiased, large variance, may be negative."""
    k2: Tensor
    """``mean(r^2 / 2)``: biased, small variance."""
    k3: Tensor
    """``mean(exp(r) - 1 - r)``: unbiased and never negative."""


def kl_estimates(policy: Tensor, reference: Tensor) -> KL:
    """Three estimates from log-probs of any shape, of whole samples or of tokens, drawn from the policy."""
    r = reference.double() - policy.double()
    return KL((-r).mean(), (r.square() / 2).mean(), (r.expm1() - r).mean())


def predicted_gain(kl: Tensor, alpha: float, beta: float) -> Tensor:
    """The over-optimisation curve ``d (alpha - beta ln d)`` at ``d = sqrt(KL)`` (arXiv:2406.02900); 0 at d = 0."""
    d = kl.double().sqrt()
    return alpha * d - beta * torch.special.xlogy(d, d)


def best_sqrt_kl(alpha: float, beta: float) -> float:
    """Where that curve is highest: ``d = exp(alpha / beta - 1)``."""
    return math.exp(alpha / beta - 1)
