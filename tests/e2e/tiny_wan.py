"""Tiny random Wan pipelines of every published kind in the published classes, and the stock call from our noise."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from diffalign.families import wan
from diffalign.families.base import load_family
from diffalign.media import Size
from diffalign.types import Request

from . import tiny_t5

SHIFT = 3.0
SCHEDULER: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
KINDS = ("2.1", "a14b", "ti2v")
BOUNDARY = 0.875
PROMPTS = ["a red circle rolls", "two green triangles", "a small blue square jumps over the other one and is gone"]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
CHANNELS, TEMPORAL = 4, 4
MEANS, STDS = [-0.7571, -0.7089, -0.9113, 0.1075], [2.8184, 1.4541, 2.3275, 2.6558]


def _transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=16,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _pipeline(kind: str) -> WanPipeline:
    """Stock classes with random weights; a VAE of 4 frames and 4 pixels to a latent, of ti2v of 8 pixels in patches."""
    patched = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True} if kind == "ti2v" else {}
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=MEANS,
        latents_std=STDS,
        scale_factor_temporal=TEMPORAL,
        scale_factor_spatial=8 if patched else 4,
        **patched,
    )
    _, tokenizer = tiny_t5.make()
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes))
    experts = {"transformer_2": _transformer(), "boundary_ratio": BOUNDARY} if kind == "a14b" else {}
    return WanPipeline(
        tokenizer,
        text_encoder,
        vae,
        UniPCMultistepScheduler(**SCHEDULER),
        _transformer(),
        expand_timesteps=kind == "ti2v",
        **experts,
    )


def save(root: Path) -> dict[str, Path]:
    """A diffusers folder of every kind, written by stock classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in KINDS:
            _pipeline(kind).save_pretrained(root / kind, safe_serialization=True)
    return {kind: root / kind for kind in KINDS}


def load_stock(folder: Path) -> WanPipeline:
    """With the Euler sampler of the same shift in place of UniPC."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pair(folder: Path) -> tuple[wan.Family, WanPipeline]:
    return load_family("wan", str(folder), "cpu"), load_stock(folder)


def noise(family: wan.Family, size: Size) -> torch.Tensor:
    shape = family.latent_shape(size)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in REQUESTS])


def stock_call(pipe: WanPipeline, latents: torch.Tensor, size: Size, steps=4, guidance=1.0, output="pt"):
    frames, height, width = size
    return pipe(
        PROMPTS, height=height, width=width, num_frames=frames, latents=latents.clone(), num_inference_steps=steps,
        guidance_scale=guidance, output_type=output,
    ).frames  # fmt: skip
