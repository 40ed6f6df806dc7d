"""Tiny random ControlNets of every kind in the folders of stock pipelines, and what tests ask of those pipelines."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from diffalign.families import controlnet
from diffalign.families.base import load_family
from diffalign.types import Request

from . import test_family_flux, test_family_sd, tiny_parts

SIZE = (32, 48)
PROMPTS = ["a photo of a red circle", "a photo of a blue square"]
CLASSES = {"sd": controlnet.Family, "sdxl": controlnet.XL, "flux": controlnet.Flux, "pixels": controlnet.Flux}
KINDS = list(CLASSES)
"""``pixels``: a FLUX ControlNet that reads the image itself."""


def _unet(model: str) -> tuple[Any, Any]:
    pipe: Any = test_family_sd._pipeline(model)
    control = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 8))
    zeros = [*control.controlnet_down_blocks, control.controlnet_mid_block, control.controlnet_cond_embedding.conv_out]
    return pipe, (control, zeros)


def _flux(pixels: bool) -> tuple[Any, Any]:
    """One block of each kind; ``pixels`` needs the VAE's published factor of 8."""
    pipe: Any = test_family_flux._pipeline("dev")
    added: dict[str, Any] = {}
    if pixels:
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        shape = {"block_out_channels": (4,) * 4, "latent_channels": 16}
        numbers = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        vae = tiny_parts.vae(use_quant_conv=False, use_post_quant_conv=False, **blocks, **shape, **numbers)
        wide = diffusers.FluxTransformer2DModel.from_config(dict(pipe.transformer.config), in_channels=64)
        pipe = diffusers.FluxPipeline(**{**pipe.components, "vae": vae, "transformer": wide})
        added = {"patch_size": 2, "conditioning_embedding_channels": 16}
    same = {key: value for key, value in pipe.transformer.config.items() if key[0] != "_" and key != "out_channels"}
    control = diffusers.FluxControlNetModel(**{**same, "num_single_layers": 1, **added})
    zeros = [*control.controlnet_blocks, *control.controlnet_single_blocks, control.controlnet_x_embedder]
    if pixels:
        zeros.append(control.input_hint_block.conv_out)
    return pipe, (control, zeros)


def make(kind: str) -> tuple[Any, Any]:
    """The base pipeline, and a ControlNet whose zero convolutions are not zero."""
    if CLASSES[kind] is controlnet.Flux:
        pipe, (control, zeros) = _flux(kind == "pixels")
    else:
        pipe, (control, zeros) = _unet("sdxl" if kind == "sdxl" else "sd1")
    for layer in zeros:
        torch.nn.init.normal_(layer.weight, std=0.1)
    hint = getattr(control, "controlnet_cond_embedding", getattr(control, "input_hint_block", None))
    for layer in () if hint is None else (hint.conv_in, *hint.blocks):
        layer.weight.data *= 3  # small random weights would let nothing of the image through
    return pipe, control


def write(root: Path, kinds: list[str]) -> dict[str, Path]:
    """By kind a stock ControlNet pipeline, its base pipeline in ``base`` below it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in kinds:
            pipe, control = make(kind)
            parts = {**pipe.components, "controlnet": control}
            unused = {"requires_safety_checker": False} if kind == "sd" else {}
            CLASSES[kind].pipeline_class()(**parts, **unused).save_pretrained(root / kind, safe_serialization=True)
            pipe.save_pretrained(root / kind / "base", safe_serialization=True)
    return {kind: root / kind for kind in kinds}


def load(folders: dict[str, Path], kind: str, adapter: Path | None = None) -> Any:
    return load_family("controlnet", str(folders[kind]), "cpu", adapter and str(adapter))


def stock_pipe(folders: dict[str, Path], kind: str) -> Any:
    unused = {"safety_checker": None, "requires_safety_checker": False} if kind == "sd" else {}
    pipe = CLASSES[kind].pipeline_class().from_pretrained(folders[kind], **unused)
    pipe.set_progress_bar_config(disable=True)
    if kind in ("sd", "sdxl"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def pictures() -> list[Image.Image]:
    """Not of the size of the samples, which makes the resizing matter."""
    values = torch.rand(2, 44, 60, 3, generator=torch.Generator().manual_seed(9)) * 255
    return [Image.fromarray(value.to(torch.uint8).numpy()) for value in values]


def requests(images: list[Image.Image] | None = None) -> list[Request]:
    return [Request(p, s, i) for p, s, i in zip(PROMPTS, (5, 6), images or pictures(), strict=True)]


def call(pipe: Any, family: Any, steps: int, guidance: float) -> Tensor:
    """The stock pipeline's images from our noise and with what ``family`` says about conditioning and guidance."""
    shape = family.latent_shape(SIZE)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    options: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": steps, "output_type": "pt"}
    options["controlnet_conditioning_scale"] = family.conditioning_scale
    images = pictures()
    if "Flux" not in type(pipe).__name__:
        return pipe(PROMPTS, image=images, latents=noise, guidance_scale=guidance, **options).images
    latents = pipe._pack_latents(noise, *noise.shape)
    if guidance != 1.0:
        options |= {"negative_prompt": [""] * 2, "true_cfg_scale": guidance}
    with pytest.MonkeyPatch.context() as patch:  # stock draws from the posterior; we take its mean
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        return pipe(PROMPTS, control_image=images, latents=latents, guidance_scale=family.guidance, **options).images
