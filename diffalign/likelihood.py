"""From network outputs to log-probabilities: the whole bridge between diffusion and text.

Diffusion: ``log p = -scale * mean((prediction - target)^2)`` up to a constant that cancels in every ratio. ``scale``
1/2 is the one half of a Gaussian log-density and the "half" of the published code. Errors are **means** over the D
elements of a latent, so that a beta keeps its meaning across resolutions; per summed squared error it is beta / D.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def denoising_error(prediction: Tensor, target: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """Mean squared error in float32 or better over every latent dimension but ``keep``.

    Args:
        prediction, target: (B, K, ...).
        keep: latent dimensions (negative indices) that become units, for example the frame axis.

    Returns:
        (B, K, U) with U = 1 when nothing is kept.
    """
    wide = prediction if prediction.element_size() >= 4 else prediction.float()
    error = (wide - target.to(wide.dtype)).square()
    kept = {dim % error.ndim for dim in keep}
    over = [dim for dim in range(2, error.ndim) if dim not in kept]
    error = error.mean(over) if over else error
    return error.flatten(2) if kept else error[..., None]


def prediction_gap(policy: Tensor, reference: Tensor) -> Tensor:
    """(B, K) mean squared difference of two predictions, a surrogate of their KL divergence."""
    return denoising_error(policy, reference)[..., 0]
