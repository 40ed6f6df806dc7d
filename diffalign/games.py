"""Exact solvers of small preference games: what the self-play losses do when nothing is sampled.

A game is a matrix ``preference`` (n, n), entry (i, j) the probability that action i beats action j, and a reference
policy (n,). With KL strength ``tau`` its equilibrium is ``pi ~ reference exp(preference pi / tau)``. Policies have
positive probabilities that sum to 1; updates are in log space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["mwu", "omd", "nash_md", "egpo", "nash_mp"]


def _normalised(log_weights: Tensor) -> Tensor:
    return log_weights.log_softmax(-1).exp()


def _anchored(policy: Tensor, reference: Tensor, share: float) -> Tensor:
    """Log of ``policy^(1 - share) reference^share``, unnormalised."""
    return (1 - share) * policy.log() + share * reference.log()


def mwu(policy: Tensor, preference: Tensor, reference: Tensor, eta: float, tau: float) -> Tensor:
    """Multiplicative weights, the idealised SPPO (arXiv:2405.00675): ``pi exp(eta P pi)``; knows no reference."""
    return _normalised(policy.log() + eta * preference @ policy)


def omd(
    policy: Tensor, preference: Tensor, reference: Tensor, eta: float, tau: float, opponent: Tensor | None = None
) -> Tensor:
    """Online mirror descent (INPO, online IPO): ``pi^(1 - eta tau) reference^(eta tau) exp(eta P opponent)``.

    The opponent is the policy itself unless given.
    """
    played = policy if opponent is None else opponent
    return _normalised(_anchored(policy, reference, eta * tau) + eta * preference @ played)


def nash_md(policy: Tensor, preference: Tensor, reference: Tensor, eta: float, tau: float) -> Tensor:
    """Nash-MD (arXiv:2312.00886): ``m exp(eta P m)`` with the geometric mixture ``m`` of policy and reference.

    As its opponent is the mixture, a fixed step ends beside the equilibrium, at a distance that shrinks with eta.
    """
    mixture = _normalised(_anchored(policy, reference, eta * tau))
    return _normalised(mixture.log() + eta * preference @ mixture)


def egpo(policy: Tensor, preference: Tensor, reference: Tensor, eta: float, tau: float) -> Tensor:
    """Extragradient (arXiv:2503.08942): mirror descent against where mirror descent would go, from the same policy."""
    half = omd(policy, preference, reference, eta, tau)
    return omd(policy, preference, reference, eta, tau, half)


def nash_mp(policy: Tensor, preference: Tensor, reference: Tensor, eta: float, tau: float) -> Tensor:
    """Nash mirror prox (arXiv:2505.19731): two steps ``(pi reference^(eta tau) exp(eta P .))^(1 / (1 + eta tau))``.

    Written from the paper's description of the KL mirror-prox step.
    """

    def proximal(opponent: Tensor) -> Tensor:
        log_weights = policy.log() + eta * tau * reference.log() + eta * preference @ opponent
        return _normalised(log_weights / (1 + eta * tau))

    return proximal(proximal(policy))


UPDATES: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {
    "mwu": mwu,
    "omd": omd,
    "nash_md": nash_md,
    "egpo": egpo,
    "nash_mp": nash_mp,
}


def play(
    preference: Tensor,
    reference: Tensor,
    initial: Tensor,
    *,
    algorithm: Algorithm,
    eta: float,
    tau: float,
    steps: int,
    momentum: float = 0.0,
) -> Tensor:
    """The policies (steps, n) after each iteration.

    Args:
        preference: (n, n) with ``P + P^T = 1``.
        reference, initial: (n,).
        algorithm: the update.
        eta: step size.
        tau: KL strength.
        steps: how many iterations.
        momentum: accelerated preference optimisation (arXiv:2410.06293): after an update to ``hat`` the policy moves
            on to ``hat (hat / previous hat)^momentum``, the first previous one being the initial policy. 0.3 there.
    """
    update, policy, before = UPDATES[algorithm], initial, initial
    policies = []
    for _ in range(steps):
        hat = update(policy, preference, reference, eta, tau)
        ahead = torch.where(hat > 0, hat.log() - before.log(), 0.0)  # what nobody plays stays unplayed
        policy = _normalised(hat.log() + momentum * ahead) if momentum else hat
        before = hat
        policies.append(policy)
    return torch.stack(policies)


def equilibrium(preference: Tensor, reference: Tensor, tau: float) -> Tensor:
    """The policy (n,) with ``pi ~ reference exp(preference pi / tau)``, in float64, to about 1e-12.

    By extragradient steps small enough to converge, which take longer for smaller tau.

    Raises:
        ValueError: tau is not positive, or too small for a million steps.
    """
    if tau <= 0:
        raise ValueError(f"only a regularised game has this equilibrium: tau must be positive, not {tau}")
    preference, reference = preference.double(), reference.double()
    eta, policy = 1 / (1 + 2 * tau), reference
    for _ in range(1_000_000):
        moved = egpo(policy, preference, reference, eta, tau)
        if (moved - policy).abs().max() <= 1e-12 * eta * tau:  # each step closes a share eta tau of the way
            return moved
        policy = moved
    raise ValueError(f"no equilibrium found at tau {tau}")


def exploitability(policy: Tensor, preference: Tensor) -> Tensor:
    """How much more than 1/2 the best answer to a policy (..., n) wins, (...)."""
    return (policy @ preference.T).amax(-1) - 0.5


def kl(first: Tensor, second: Tensor) -> Tensor:
    """``KL(first || second)`` of policies (..., n)."""
    return torch.special.xlogy(first, torch.where(first > 0, first / second, 1.0)).sum(-1)
