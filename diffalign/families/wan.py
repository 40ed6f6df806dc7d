"""Wan 2.1 and 2.2 text-to-video (arXiv:2503.20314): rectified flow on clips, a causal video VAE, UMT5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.families._pipeline import DiffusersFamily
from diffalign.media import Modality, Size
from diffalign.schedule import Rectified
from diffalign.types import Condition

TOKENS = 512  # of a prompt, after which the states are zeros; the network attends to those too


class Family(DiffusersFamily):
    """Text-to-video Wan behind the diffusion protocol: 2.1 of 1.3B and 14B, 2.2 of A14B and TI2V-5B.

    A size is frames, height and width. A clip of F = 4 k + 1 frames is k + 1 latent frames: the VAE makes the first of
    one frame and every later one of four.

    Of the two experts of 2.2 A14B the one for high noise trains, ``transformer``: training times are drawn from
    ``boundary_ratio`` on, where it acts. ``transformer_2`` is frozen and samples from there down. There is no way to
    train that one, and one guidance for both (the stock ``guidance_scale_2`` left alone). TI2V-5B is text-to-video
    here, without a first image; files are written at 16 frames per second, and its rate is 24.

    Times: the shift of the scheduler's config, on the grid of the stock ``FlowMatchEulerDiscreteScheduler(shift)``.
    The published folders come with UniPC of the same shift, which samples otherwise: a second-order multistep solver
    with a corrector, on even times before the shift that end at 1 / steps, and networks called with integers. The same
    noise gives another clip there.
    """

    name = "wan"
    modality: Modality = "video"
    pipeline = "WanPipeline"
    without = ("transformer_2",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        _check(pipe, source)
        super().__init__(pipe, source, device)
        self._parts.pop("transformer_2", None)  # not an encoder: encodings do not depend on it
        self.low_noise: nn.Module | None = pipe.transformer_2
        self.boundary: float = pipe.config.boundary_ratio or 0.0
        config = pipe.scheduler.config
        shift = config.flow_shift if "flow_shift" in config else config.shift
        self.schedule = Rectified(shift=shift, least=self.boundary)

    # --- sizes --------------------------------------------------------------------------------------------------

    @property
    def default_size(self) -> Size:
        """As released: 81 frames of 480 x 832, of TI2V-5B 121 of 704 x 1280."""
        return (121, 704, 1280) if self.pipe.config.expand_timesteps else (81, 480, 832)

    @property
    def size_rule(self) -> tuple[int, int | None]:
        """Whole patches of latents; rotary positions are stored up to a number of patches."""
        config: Any = self.net.config
        step = self.pipe.vae_scale_factor_spatial * config.patch_size[-1]
        return step, step * config.rope_max_seq_len

    def sample_size(self, size: Size | None) -> Size:
        """Frames, height and width that will be used for a wish.

        Raises:
            UserError: a size the model cannot represent.
        """
        if size is not None and len(size) != 3:
            raise UserError(f"size {list(size)}: {self.name} makes clips, give frames, height and width")
        frames, *sides = size or self.default_size
        period = self.pipe.vae_scale_factor_temporal
        if frames < 1 or (frames - 1) % period:
            raise UserError(f"size {frames}x{sides[0]}x{sides[1]}: frames must be a multiple of {period} and one more")
        return frames, *super().sample_size((sides[0], sides[1]))

    def latent_shape(self, size: Size | None) -> tuple[int, ...]:
        """(C, f, h, w) of a latent for a clip of ``size``."""
        frames, height, width = self.sample_size(size)
        factor = self.pipe.vae_scale_factor_spatial
        latent_frames = (frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        return self.vae.config.z_dim, latent_frames, height // factor, width // factor

    # --- the network --------------------------------------------------------------------------------------------

    def _encode(self, prompts: list[str]) -> Condition:
        states, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device=self.device
        )
        return {"states": states}

    def blank_condition(self) -> Condition:
        """States of a prompt; the text encoder looks at the values of its mask."""
        return {"states": torch.zeros(1, TOKENS, self.pipe.text_encoder.config.d_model, device=self.device)}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Velocity (N, C, f, h, w) at time ``t`` (N,): below the boundary of two experts the frozen one's."""
        if self.low_noise is None or t.is_meta:  # a meta time has no value: count the network that trains
            return self._velocity(net, x_t, t, cond["states"])
        high = t >= self.boundary
        experts = [(expert, rows) for expert, rows in ((net, high), (self.low_noise, ~high)) if rows.any()]
        found = [self._velocity(expert, x_t[rows], t[rows], cond["states"][rows]) for expert, rows in experts]
        order = torch.cat([rows.nonzero()[:, 0] for _, rows in experts])
        return torch.cat(found)[order.argsort()]

    def _velocity(self, net: nn.Module, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        # TI2V-5B can take a time per token; without a first image all are equal, and one is the same
        return net(
            hidden_states=x_t,
            timestep=self.schedule.native(t),
            encoder_hidden_states=states,
            return_dict=False,
        )[0]


def _check(pipe: Any, source: str) -> None:
    """Refuse pipelines of another task, and schedules that are no flow with a static shift.

    Raises:
        UserError: says which part does not fit.
    """
    channels, latent = pipe.transformer.config.in_channels, pipe.vae.config.z_dim
    if channels != latent:
        raise UserError(
            f"model.path: the transformer of {source} takes {channels} channels and its latents have {latent}; only "
            "text-to-video Wan is supported, not its image-to-video and editing models"
        )
    if (pipe.transformer_2 is None) != (pipe.config.boundary_ratio is None):
        raise UserError(f"model.path: {source}: two experts need a transformer_2 and a boundary_ratio, and one neither")
    config, kind = pipe.scheduler.config, type(pipe.scheduler).__name__
    is_flow = kind == "FlowMatchEulerDiscreteScheduler" or (
        kind == "UniPCMultistepScheduler" and config.use_flow_sigmas
    )
    if not is_flow or config.use_dynamic_shifting:
        raise UserError(
            f"model.path: the scheduler of {source} is a {kind}; wan needs UniPCMultistepScheduler with flow sigmas or "
            "FlowMatchEulerDiscreteScheduler, with a static shift"
        )
