"""Stable Diffusion XL (arXiv:2307.01952): the UNet of SD with two CLIP encoders and the image size as conditions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.families import sd
from diffalign.media import View
from diffalign.types import Condition


class Family(sd.Family):
    """SDXL base behind the diffusion protocol. The empty prompt is zeros where the checkpoint says so, as in sampling.

    It is told the size of the picture's file, where it was cropped, and the size used (section 2.2), in pixels.
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

    def encode_geometry(self, views: Iterable[View]) -> Condition:
        """``sizes`` (N, 6): height and width of the original, top and left of the crop, height and width used."""
        rows = [[*view.original, *view.crop, *view.target] for view in views]
        return {"sizes": torch.tensor(rows, dtype=torch.float32, device=self.device)}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Noise or v (N, C, h, w) at time ``t`` (N,)."""
        return net(
            x_t,
            self.schedule.native(t),
            encoder_hidden_states=cond["states"],
            added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": cond["sizes"]},
            return_dict=False,
        )[0]
