"""Random numbers that depend on what they are for, not on who draws them.

Wherever a ``generator`` is taken it may be a list of them, one per leading row, as in diffusers. A run keys one by the
place of each record in the run (:func:`keyed`), so a record gets the same noise in whatever micro-batch, and on
whatever rank, it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator]


def keyed(device: torch.device, *key: int) -> torch.Generator:
    """A generator that the numbers of a key decide; keys that differ give independent streams."""
    words = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 ^ int(words[1]))


def device_of(generator: Generator) -> torch.device:
    """Where the numbers are drawn."""
    return generator.device if isinstance(generator, torch.Generator) else generator[0].device


def _drawn(draw: Callable[..., Tensor], shape: Sequence[int], generator: Generator) -> Tensor:
    if isinstance(generator, torch.Generator):
        return draw(shape, generator=generator, device=generator.device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} rows")
    return torch.stack([draw(shape[1:], generator=own, device=own.device) for own in generator])


def randn(shape: Sequence[int], generator: Generator) -> Tensor:
    """Standard normal numbers."""
    return _drawn(torch.randn, shape, generator)


def rand(shape: Sequence[int], generator: Generator) -> Tensor:
    """Uniform numbers in [0, 1)."""
    return _drawn(torch.rand, shape, generator)
