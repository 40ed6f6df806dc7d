"""Stable Diffusion XL (arXiv:2307.01952): the UNet of SD with two CLIP encoders and the image size as conditions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.families import sd
from diffalign.types import Condition


class Family(sd.Family):
    """SDXL base behind the diffusion protocol. The empty prompt is zeros where the checkpoint says so, as in sampling.

    Original and target size are the size used, without a crop: ``(h, w, 0, 0, h, w)`` in pixels.
    """

    name = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    options: ClassVar = {**dict.fromkeys(("feature_extractor", "image_encoder")), "add_watermarker": False}
    added = "text_time"

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        super().__init__(pipe, source, device)
        if pipe.text_encoder is None:
            raise UserError(f"model.path: {source} has one text encoder: a refiner, and only base models are supported")

    def _encode(self, prompts: list[str]) -> Condition:
        states, _, pooled, _ = self.pipe.encode_prompt(prompts, None, self.device, 1, False)
        if self.pipe.config.force_zeros_for_empty_prompt:
            given = torch.tensor([prompt != "" for prompt in prompts], device=self.device)
            states, pooled = states * given[:, None, None], pooled * given[:, None]
        return {"states": states, "pooled": pooled}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Noise or v (N, C, h, w) at time ``t`` (N,)."""
        height, width = (side * self.pipe.vae_scale_factor for side in x_t.shape[-2:])
        sizes = torch.tensor([[height, width, 0.0, 0.0, height, width]], device=x_t.device).expand(len(x_t), -1)
        return net(
            x_t,
            self.schedule.native(t),
            encoder_hidden_states=cond["states"],
            added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]
