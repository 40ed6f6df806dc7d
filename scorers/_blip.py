"""ImageReward's network (arXiv:2304.05977): BLIP encoders and a linear stack, published names mapped.

The text encoder is a BERT whose layers also look at the picture; its first token goes into the stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ._head import linear_stack

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw rewards, published with the weights
UNUSED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")
"""In the published file, and read by nothing: BLIP's own heads."""

VISION = (  # published name -> name in transformers
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
)
TEXT = ((r"^blip\.text_encoder\.", "text."), (r"^mlp\.layers\.", "head."))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the network; as published: ViT-L/16 at 224 pixels and BERT base."""

    image: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    words: int = 30524


class RewardNet(nn.Module):
    """Pictures and token ids to rewards."""

    def __init__(self, sizes: Sizes) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image,
            patch_size=sizes.patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=sizes.words,
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=512,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            is_decoder=True,  # gives the layers their attention to the picture
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = linear_stack(sizes.text_width)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(N,) rewards in float32 from (N, 3, H, W) pictures and (N, L) token ids with their mask."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        words = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False)
        return (self.head(words.last_hidden_state[:, 0].float())[:, 0] - MEAN) / STD


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict under the names of :class:`RewardNet`; names it does not know stay as they are."""
    known = {}
    for key, value in state.items():
        if not key.startswith(UNUSED):
            known[_name(key)] = value
    return known


def _name(key: str) -> str:
    for pattern, name in (*VISION, *TEXT):
        key, found = re.subn(pattern, name, key)
        if found:
            break
    return key
