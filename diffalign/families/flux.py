"""FLUX.1 dev and schnell (Black Forest Labs, 2024): rectified flow on packed latents, CLIP for the pooled text, T5."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.errors import UserError
from diffalign.families._pipeline import DiffusersFamily
from diffalign.media import Size
from diffalign.schedule import Rectified
from diffalign.types import Condition

PATCH = 2


JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""Linear layers of attention over image and text tokens together."""


class PackedFamily(DiffusersFamily):
    """Models whose network reads 2 x 2 patches of latents as tokens with rotary positions."""

    @property
    def default_size(self) -> tuple[int, int]:
        """The stock pipeline's: 1024 x 1024 with a VAE of factor 8."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    @property
    def size_rule(self) -> tuple[int, int | None]:
        """Whole patches of latents; rotary positions set no maximum that an image reaches."""
        return self.pipe.vae_scale_factor * PATCH, None


class Family(PackedFamily):
    """FLUX.1 behind the diffusion protocol; packing, ids and the guidance embedding stay inside :meth:`predict`.

    The network of dev is distilled from classifier-free guidance and takes its scale as an input: ``guidance`` here,
    one value for every role and for sampling (schnell has no such input). ``sampling.guidance`` is something else, true
    classifier-free guidance with the empty prompt (``true_cfg_scale`` of the stock pipeline), off at 1.

    Times: dev shifts by ``exp(mu)``, mu linear in the number of image tokens; schnell does not shift. Sampling uses the
    shift of the size that is sampled. Training times are drawn with that of the default size, 1024 x 1024: a shift s
    moves a logit-normal density by log s, so they are ``sigmoid(mu + N(0, 1))`` with mu = 1.15. For a size with another
    mu set ``draw.density.mean`` to the difference, -0.52 at 512 x 512.
    """

    name = "flux"
    pipeline = "FluxPipeline"
    guidance: float = 3.5
    """What dev is told its guidance scale is; the stock pipeline's ``guidance_scale`` and its default."""
    lora_targets = (  # in the single-stream blocks: attn.to_q, attn.to_k and attn.to_v
        *JOINT_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        check_parts(pipe, source, self.name, "FluxTransformer2DModel")
        channels, packed = pipe.transformer.config.in_channels, PATCH**2 * pipe.vae.config.latent_channels
        if channels != packed:
            raise UserError(
                f"model.path: the transformer of {source} takes {channels} channels per token and its packed latents "
                f"have {packed}; only text-to-image FLUX.1 (dev, schnell) is supported, not Fill, Canny or Depth"
            )
        super().__init__(pipe, source, device)
        self.is_guided = bool(pipe.transformer.config.guidance_embeds)
        self.t5_tokens = 512 if self.is_guided else 256  # as dev and schnell were released
        self.schedule = self.schedule_for(None)

    def _digest(self) -> str:
        return f"{super()._digest()}-{self.t5_tokens}"  # dev and schnell share their encoders

    def schedule_for(self, size: Size | None) -> Rectified:
        """The stock scheduler's static shift, or its dynamic one for an image of ``size``; times go in as they are."""
        height, width = self.latent_shape(size)[-2:]
        return shifted_schedule(self.pipe.scheduler.config, (height // PATCH) * (width // PATCH))

    # --- the network --------------------------------------------------------------------------------------------

    def _encode(self, prompts: list[str]) -> Condition:
        states, pooled, _ = self.pipe.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.t5_tokens
        )
        return {"states": states, "pooled": pooled}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Velocity (N, C, h, w) at time ``t`` (N,)."""
        grid = (x_t.shape[-2] // PATCH, x_t.shape[-1] // PATCH)
        tokens = net(
            hidden_states=pack(x_t),
            encoder_hidden_states=cond["states"],
            pooled_projections=cond["pooled"],
            timestep=self.schedule.native(t),
            guidance=torch.full_like(t, self.guidance) if self.is_guided else None,
            img_ids=_positions(*grid, x_t),
            txt_ids=x_t.new_zeros(cond["states"].shape[1], 3),
            return_dict=False,
        )[0]
        return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)


def pack(latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h w / 4, 4 C): a token per patch."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 3): 0, row and column of every token."""
    ids = like.new_zeros(height, width, 3)
    ids[..., 1] = torch.arange(height, device=like.device)[:, None]
    ids[..., 2] = torch.arange(width, device=like.device)
    return ids.flatten(0, 1)


def shifted_schedule(config: Any, tokens: int) -> Rectified:
    """The stock scheduler's static shift, or ``exp(mu)`` with mu linear in the number of tokens of an image."""
    shift = config.shift
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    return Rectified(shift=shift, scale=1.0, even=True, terminal=config.shift_terminal or None)


def check_parts(pipe: Any, source: str, family: str, transformer: str) -> None:
    """Refuse what loads as a pipeline of a flow model and has parts of another model.

    Raises:
        UserError: the transformer or the scheduler is of another class.
    """
    wanted = {"transformer": transformer, "scheduler": "FlowMatchEulerDiscreteScheduler"}
    for part, kind in wanted.items():
        found = type(getattr(pipe, part)).__name__
        if found != kind:
            raise UserError(f"model.path: the {part} of {source} is a {found}; {family} needs a {kind}")
