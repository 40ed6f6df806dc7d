"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752): a UNet on a discrete schedule, one CLIP encoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.families._pipeline import DiffusersFamily
from diffalign.foreign import foreign_files
from diffalign.schedule import Discrete
from diffalign.types import Condition


def discrete_schedule(scheduler: Any) -> Discrete:
    """Noise levels, parametrisation and last level of a stock scheduler, as ``DDIMScheduler`` reads its config.

    Raises:
        UserError: a flow scheduler, or a network that predicts neither noise nor v.
    """
    from diffusers import DDIMScheduler

    kind, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type", "epsilon")
    if "beta_schedule" not in scheduler.config or prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"model.path: {kind} with prediction {prediction!r} is no discrete schedule of noise or v")
    with foreign_files(f"model.path: {kind} is no discrete schedule"):
        stock: Any = DDIMScheduler.from_config(scheduler.config)
    return Discrete(tuple(stock.alphas_cumprod.tolist()), prediction, float(stock.final_alpha_cumprod))


class Family(DiffusersFamily):
    """SD behind the diffusion protocol. The safety checker plays no part and is not loaded."""

    name = "sd"
    net_name = "unet"
    pipeline = "StableDiffusionPipeline"
    options: ClassVar = {
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
        "requires_safety_checker": False,
    }
    added: ClassVar[str | None] = None
    """What the unet is conditioned on beside time and text, in the words of its config."""

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        super().__init__(pipe, source, device)
        config: Any = pipe.unet.config
        if config.addition_embed_type != self.added:
            raise UserError(
                f"model.path: {source} is no {self.name}: the addition_embed_type of its unet is "
                f"{config.addition_embed_type!r}, not {self.added!r}; give another model.family"
            )
        if config.in_channels != self.vae.config.latent_channels:
            raise UserError(
                f"model.path: the unet of {source} reads {config.in_channels} channels, a latent has "
                f"{self.vae.config.latent_channels}; inpainting and editing models are not supported"
            )
        self.schedule = discrete_schedule(pipe.scheduler)
        self.vae.enable_slicing()  # image by image: many at once, in float32, would not fit

    def _encode(self, prompts: list[str]) -> Condition:
        return {"states": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Noise or v (N, C, h, w) at time ``t`` (N,)."""
        return net(x_t, self.schedule.native(t), encoder_hidden_states=cond["states"], return_dict=False)[0]
