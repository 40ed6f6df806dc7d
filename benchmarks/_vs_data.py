"""Pipelines of stock classes with random weights, and one data set of pairs in both formats, for vs_diffusers.py."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.worlds.shapes.pretrain import _tokenizer
from diffalign.worlds.shapes.prompts import prompts

SIDE = 128
TOKENS = 77
LEVELS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def write_pipeline(kind: str, folder: Path) -> None:
    """SD 1.5 or SDXL in small, as a stock folder.

    Depth, attention and conditions are as published; the widths of UNet and VAE are chosen so that encoding an image
    costs as much of a forward as in the published sizes (SD 1.5 at 512 pixels: 1.39 of it, here 1.20; SDXL at 1024
    pixels: 0.72, here 0.73). The text encoders are the published ones in less than a tenth of the width.
    """
    import diffusers

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    tokenizer.model_max_length = TOKENS
    parts = {
        "tokenizer": tokenizer,
        "vae": _vae(0.18215 if kind == "sd" else 0.13025),
        "scheduler": diffusers.DDIMScheduler(**LEVELS, clip_sample=False, set_alpha_to_one=False),
        "text_encoder": _text_encoder("CLIPTextModel", tokenizer, 128 if kind == "sdxl" else 256),
    }
    if kind == "sd":
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        unet = _unet((64, 128, 256, 256), cross_attention_dim=256, attention_head_dim=8)
        pipe = diffusers.StableDiffusionPipeline(**parts, unet=unet, **unused)
    else:
        second = _text_encoder("CLIPTextModelWithProjection", tokenizer, 256)
        pipe = diffusers.StableDiffusionXLPipeline(
            **parts, unet=_unet_xl(), text_encoder_2=second, tokenizer_2=tokenizer
        )
    pipe.save_pretrained(folder)


def _vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 96),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=scaling_factor,
    )


def _unet(channels: tuple[int, ...], **settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=SIDE // 8, block_out_channels=channels, **settings)


def _unet_xl() -> Any:
    return _unet(
        (64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 4],
        attention_head_dim=[2, 4, 8],
        cross_attention_dim=128 + 256,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=256 + 6 * 32,
    )


def _text_encoder(kind: str, tokenizer: Any, width: int) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=6,
        num_attention_heads=width // 32,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, kind)(config)


def write_pairs(folder: Path, count: int) -> None:
    """``records.jsonl`` with its media, and ``pick/`` with the same files in the columns of Pick-a-Pic."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    texts = itertools.islice(itertools.cycle(dict.fromkeys(m["prompt"] for m in prompts("train"))), count)
    (folder / "media").mkdir(parents=True)
    (folder / "pick").mkdir()
    rows, lines = [], []
    for i, text in enumerate(texts):
        pictures = [_jpeg(generator) for _ in range(2)]
        first = int(torch.rand((), generator=generator) < 0.5)
        candidates = []
        for j, (picture, reward) in enumerate(zip(pictures, (first, 1 - first), strict=True)):
            name = f"media/{i:04d}_{j}.jpg"
            (folder / name).write_bytes(picture)
            candidates.append({"sample": name, "labels": {"reward": float(reward)}})
        lines.append(json.dumps({"id": f"{i:04d}", "prompt": text, "candidates": candidates}))
        rows.append({"jpg_0": pictures[0], "jpg_1": pictures[1], "label_0": float(first), "caption": text})
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    Dataset.from_list(rows).to_parquet(str(folder / "pick" / "train-00000-of-00001.parquet"))


def _jpeg(generator: torch.Generator) -> bytes:
    """A smooth random picture with some grain, as the bytes of a file."""
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=SIDE, mode="bicubic", align_corners=False)[0]
    picture = (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    out = io.BytesIO()
    Image.fromarray((255 * picture).byte().permute(1, 2, 0).numpy()).save(out, "JPEG", quality=95)
    return out.getvalue()
