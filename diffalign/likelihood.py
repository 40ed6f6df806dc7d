"""From network outputs to log-probabilities: the whole bridge between diffusion and text.

Diffusion: ``log p = -scale * mean((prediction - target)^2)`` up to a constant that cancels in every ratio. ``scale``
1/2 is the one half of a Gaussian log-density and the "half" of the published code. Errors are **means** over the D
elements of a latent, so that a beta keeps its meaning across resolutions; per summed squared error it is beta / D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """In float32 or better."""
    return values if values.element_size() >= 4 else values.float()


def denoising_error(prediction: Tensor, target: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """Mean squared error in float32 or better over every latent dimension but ``keep``.

    Args:
        prediction, target: (B, K, ...).
        keep: latent dimensions (negative indices) that become units, for example the frame axis.

    Returns:
        (B, K, U) with U = 1 when nothing is kept.
    """
    prediction = wide(prediction)
    error = (prediction - target.to(prediction.dtype)).square()
    kept = {dim % error.ndim for dim in keep}
    over = [dim for dim in range(2, error.ndim) if dim not in kept]
    error = error.mean(over) if over else error
    return error.flatten(2) if kept else error[..., None]


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability in nats of each token under the logits that predict it, in float32 or better.

    Args:
        logits: (..., V), unnormalised.
        ids: (...) token ids.

    Returns:
        (...), without ever holding a second (..., V) of log-probabilities.
    """
    logits = wide(logits)
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def token_kl(reference_logits: Tensor, policy_logits: Tensor) -> Tensor:
    """Exact ``KL(reference || policy)`` over the vocabulary at each position, (..., V) -> (...).

    Swapped arguments give ``KL(policy || reference)``. Tokens that the first excludes (logit -inf) add nothing.
    """
    first, second = (wide(logits).log_softmax(-1) for logits in (reference_logits, policy_logits))
    possible = first > -torch.inf
    difference = torch.where(possible, first, 0.0) - torch.where(possible, second, 0.0)
    return (first.exp() * difference).sum(-1)


def geometric_mixture(policy_logits: Tensor, reference_logits: Tensor, mixture: float) -> Tensor:
    """Log-probs of ``policy^(1 - mixture) reference^mixture``, normalised per token (arXiv:2312.00886; IPO-MD).

    The mixture of whole sequences would need a global normaliser; per token is what releases do.

    Args:
        policy_logits, reference_logits: (..., V).
        mixture: the reference's weight in [0, 1]; 0.125 to 0.375 in the paper.
    """
    if not 0 <= mixture <= 1:
        raise ValueError(f"a mixture weight is in [0, 1], not {mixture}")
    ends = ((1 - mixture, policy_logits), (mixture, reference_logits))
    terms = [weight * wide(logits) for weight, logits in ends if weight]  # 0 * -inf would be NaN
    return torch.stack(terms).sum(0).log_softmax(-1)
