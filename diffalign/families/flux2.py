"""FLUX.2 dev and klein (Black Forest Labs, 2025, 2026): rectified flow on patches of latents, Mistral 3 or Qwen3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.errors import UserError
from diffalign.families._pipeline import DiffusersFamily
from diffalign.families.flux import JOINT_ATTENTION, PATCH, PackedFamily, check_parts, shifted_schedule
from diffalign.media import Size
from diffalign.schedule import Rectified
from diffalign.types import Condition

TOKENS = 512  # of a prompt; padding is attended to, so all of them count
USUAL_STEPS = 50


class Family(PackedFamily):
    """FLUX.2 behind the diffusion protocol: dev here, klein in :class:`Klein`, which a checkpoint of it loads as.

    A latent is what the network sees: (4 C, h / 2, w / 2), patches of 2 x 2 normalised with the statistics of the VAE's
    batch norm.

    The network of dev is distilled from classifier-free guidance and takes its scale as an input: ``guidance`` here,
    one value for every role and for sampling. ``sampling.guidance`` is true classifier-free guidance with the empty
    prompt: what klein base is sampled with (4 in the stock pipeline), and off at 1 for dev and the distilled klein.

    Times: the shift ``exp(mu)`` falls with the number of sampling steps and depends on the number of image tokens.
    Training times are drawn with that of 50 steps, mu = 2.02 at 1024 x 1024: ``sigmoid(mu + N(0, 1))``, most of them
    near noise. ``draw.density.mean`` moves them; -2.02 takes the shift away.
    """

    name = "flux2"
    pipeline = "Flux2Pipeline"
    guidance: float = 4.0
    """What dev is told its guidance scale is; the stock pipeline's ``guidance_scale`` and its default."""
    lora_targets = (
        *JOINT_ATTENTION,
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        "attn.to_qkv_mlp_proj",
        # by number, as attn.to_out is a list in the double-stream blocks: 48 in dev, fewer in klein
        *(f"single_transformer_blocks.{index}.attn.to_out" for index in range(48)),
    )

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        check_parts(pipe, source, self.name, "Flux2Transformer2DModel")
        channels, packed = pipe.transformer.config.in_channels, PATCH**2 * pipe.vae.config.latent_channels
        if channels != packed:
            raise UserError(
                f"model.path: the transformer of {source} takes {channels} channels per token and its latents have "
                f"{packed}; only FLUX.2 dev and klein are supported"
            )
        super().__init__(pipe, source, device)
        self.is_guided = bool(pipe.transformer.config.guidance_embeds)
        self.schedule = self.schedule_for(None)
        norm, eps = pipe.vae.bn, pipe.vae.config.batch_norm_eps
        self._mean = norm.running_mean[:, None, None]
        """Of every channel of a patch, (4 C, 1, 1)."""
        self._std = (norm.running_var + eps).sqrt()[:, None, None]

    @classmethod
    def variant(cls, pipeline: str | None) -> type[DiffusersFamily]:
        """Dev and klein have a stock pipeline each."""
        return Klein if pipeline == Klein.pipeline else cls

    # --- sizes and latents --------------------------------------------------------------------------------------

    def latent_shape(self, size: Size | None) -> tuple[int, ...]:
        """(4 C, h / 2, w / 2) of a latent for an image of ``size`` pixels."""
        channels, height, width = super().latent_shape(size)
        return channels * PATCH**2, height // PATCH, width // PATCH

    def to_network(self, z: Tensor) -> Tensor:
        """(..., C, h, w) of the VAE -> (..., 4 C, h / 2, w / 2), normalised."""
        return (pixel_unshuffle(z, PATCH) - self._mean.to(z)) / self._std.to(z)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`to_network`."""
        return pixel_shuffle(latents * self._std.to(latents) + self._mean.to(latents), PATCH)

    def schedule_for(self, size: Size | None) -> Rectified:
        """The stock scheduler's static shift, or the empirical one for an image of ``size``."""
        config = self.pipe.scheduler.config
        height, width = self.latent_shape(size)[-2:]
        tokens = height * width
        if not config.use_dynamic_shifting:
            return shifted_schedule(config, tokens)
        return Empirical(math.exp(empirical_mu(tokens, USUAL_STEPS)), 1.0, True, tokens=tokens)

    # --- the network --------------------------------------------------------------------------------------------

    def _encode(self, prompts: list[str]) -> Condition:
        """One by one: the hidden states of all layers are held, for dev half a gigabyte a prompt."""
        options = {"device": self.device, "max_sequence_length": TOKENS}
        return {"states": torch.cat([self.pipe.encode_prompt(prompt, **options)[0] for prompt in prompts])}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Velocity (N, C, h, w) at time ``t`` (N,)."""
        height, width = x_t.shape[-2:]
        tokens = net(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            encoder_hidden_states=cond["states"],
            timestep=self.schedule.native(t),
            guidance=torch.full_like(t, self.guidance) if self.is_guided else None,
            img_ids=_positions(height, width, 1, x_t.device),
            txt_ids=_positions(1, 1, cond["states"].shape[1], x_t.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))


class Klein(Family):
    """FLUX.2 klein 4B and 9B, base and distilled: Qwen3 reads the prompt, and no guidance scale goes in."""

    pipeline = "Flux2KleinPipeline"


@dataclass(frozen=True, slots=True)
class Empirical(Rectified):
    """The flow of FLUX.2: the shift of a grid depends on its number of steps; ``shift`` is that of 50.

    Args:
        tokens: of the image.
    """

    tokens: int = 4096

    def grid(self, steps: int) -> Tensor:
        """``steps + 1`` decreasing times from 1 to 0, as the stock pipeline sets them."""
        shift = math.exp(empirical_mu(self.tokens, steps))
        return Rectified(shift, self.scale, self.even, self.terminal).grid(steps)


def empirical_mu(tokens: int, steps: int) -> float:
    """The log-shift of the released sampler: fits at 10 and 200 steps, linear between them and beyond.

    Above 4300 tokens it is that of 200 steps.
    """
    many, few = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    return many if tokens > 4300 else many + (many - few) / 190 * (steps - 200)


def _positions(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """(height * width * length, 4): picture (there is one), row, column and place in the prompt of every token."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, height, width, length)))
