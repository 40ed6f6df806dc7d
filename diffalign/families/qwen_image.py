"""Qwen-Image (arXiv:2508.02324): rectified flow on packed latents of a video VAE, Qwen2.5-VL reads the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.errors import UserError
from diffalign.families.flux import JOINT_ATTENTION, PATCH, PackedFamily, check_parts, shifted_schedule
from diffalign.media import Size
from diffalign.schedule import Rectified
from diffalign.types import Condition, joined

TOKENS = 512  # of a prompt, at most


class Family(PackedFamily):
    """Text-to-image Qwen-Image behind the diffusion protocol; an image is a clip of one frame to the VAE.

    ``sampling.guidance`` is the stock ``true_cfg_scale`` with the negative prompt "" (the model card uses 4 and " ").
    As there, the guided prediction gets the norm, token by token, of the one with the prompt.

    Times: the shift is ``exp(mu)``, mu linear in the number of image tokens, and a grid is stretched to end at 0.02
    before 0. Training times are drawn with the shift of their size, without the stretch.
    """

    name = "qwen_image"
    pipeline = "QwenImagePipeline"
    lora_targets = (
        *JOINT_ATTENTION,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        check_parts(pipe, source, self.name, "QwenImageTransformer2DModel")
        more = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
        added = [name for name in more if pipe.transformer.config[name]]
        if added:
            raise UserError(
                f"model.path: the transformer of {source} is made with {', '.join(added)}; only text-to-image "
                "Qwen-Image is supported, not its editing and layered models"
            )
        super().__init__(pipe, source, device)
        self.schedule = self.schedule_for(None)

    # --- sizes and latents --------------------------------------------------------------------------------------

    def latent_shape(self, size: Size | None) -> tuple[int, ...]:
        """(C, h, w) of a latent for an image of ``size`` pixels."""
        factor = self.pipe.vae_scale_factor
        height, width = self.sample_size(size)
        return self.vae.config.z_dim, height // factor, width // factor

    def encode_media(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] -> mean and log-variance of the VAE posterior, unscaled."""
        mean, logvar = super().encode_media(pixels[:, :, None])
        return mean[:, :, 0], logvar[:, :, 0]

    def decode(self, latents: Tensor) -> Tensor:
        """Network-space latents -> images (N, 3, H, W) in [0, 1]."""
        return super().decode(latents)[:, :, 0]

    def to_vae(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) of the network -> (N, C, 1, h, w) of the VAE."""
        return super().to_vae(latents)[:, :, None]

    def schedule_for(self, size: Size | None) -> Rectified:
        """The stock scheduler's static shift, or its dynamic one for an image of ``size``; times go in as they are."""
        height, width = self.latent_shape(size)[-2:]
        return shifted_schedule(self.pipe.scheduler.config, (height // PATCH) * (width // PATCH))

    # --- the network --------------------------------------------------------------------------------------------

    def _encode(self, prompts: list[str]) -> Condition:
        """One by one, so that nothing is padded and the hidden states of all layers stay small."""
        options = {"device": self.device, "max_sequence_length": TOKENS}
        states = [self.pipe.encode_prompt(prompt, **options)[0] for prompt in prompts]
        return joined([{"states": s, "mask": s.new_ones(s.shape[:2], dtype=torch.bool)} for s in states])

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Velocity (N, C, h, w) at time ``t`` (N,); the padding that no prompt of the batch needs is cut off."""
        grid = (x_t.shape[-2] // PATCH, x_t.shape[-1] // PATCH)
        mask = cond["mask"][:, : int(cond["mask"].sum(1).max())]
        tokens = net(
            hidden_states=pixel_unshuffle(x_t, PATCH).flatten(2).transpose(1, 2),
            encoder_hidden_states=cond["states"][:, : mask.shape[1]],
            encoder_hidden_states_mask=None if mask.all() else mask,  # attention without a mask is faster
            timestep=self.schedule.native(t),
            img_shapes=[[(1, *grid)]] * len(x_t),
            return_dict=False,
        )[0]
        return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)

    def rescale(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        """The guided prediction with the norm of every token of the one with the prompt, (N, C, h, w)."""
        tokens, wanted = (pixel_unshuffle(value, PATCH) for value in (guided, with_prompt))
        return pixel_shuffle(tokens * (wanted.norm(dim=1, keepdim=True) / tokens.norm(dim=1, keepdim=True)), PATCH)
