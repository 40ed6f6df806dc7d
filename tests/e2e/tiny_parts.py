"""Random parts of image pipelines, of a few thousand parameters each, in the published classes."""

from typing import Any


def vae(**changes: Any) -> Any:
    """Four pixels to a latent side, four channels; 32x32 images are 4x8x8 latents."""
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (4, 4, 4),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 32,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**{**settings, **changes})


def clip(kind: Any, tokenizer: Any, **changes: Any) -> Any:
    """A CLIP text encoder of width 8 of the class given, for prompts of at most 16 tokens."""
    from transformers import CLIPTextConfig

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 8,
        "intermediate_size": 16,
        "projection_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    return kind(CLIPTextConfig(**{**settings, **changes}))


def sd_pipeline() -> Any:
    """Stable Diffusion 1: 32x32 images, 4x8x8 latents, noise prediction on a discrete schedule."""
    import diffusers
    from transformers import CLIPTextModel

    from diffalign.worlds.shapes.pretrain import TOKENS, _tokenizer

    tokenizer = _tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    encoder = clip(CLIPTextModel, tokenizer, max_position_embeddings=TOKENS, initializer_factor=8.0)
    levels: Any = {"beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}
    return diffusers.StableDiffusionPipeline(
        vae=vae(), unet=unet, text_encoder=encoder, tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(**levels),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
