"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): rectified flow, two CLIP encoders, T5 optional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffalign.families._pipeline import DiffusersFamily
from diffalign.schedule import Rectified
from diffalign.types import Condition


class Family(DiffusersFamily):
    """SD3 behind the diffusion protocol. Without T5 no zero tokens are appended: ``max_sequence_length`` is 0."""

    name = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    without = ("text_encoder_3", "tokenizer_3")
    blocks = ("JointTransformerBlock",)
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        super().__init__(pipe, source, device)
        self.schedule = Rectified(shift=pipe.scheduler.config.shift)
        self.t5_tokens = 256 if pipe.text_encoder_3 is not None else 0

    @property
    def size_rule(self) -> tuple[int, int | None]:
        """Whole patches, and no more of them than there are position embeddings."""
        config: Any = self.net.config
        step = self.pipe.vae_scale_factor * config.patch_size
        return step, step * config.pos_embed_max_size

    def _encode(self, prompts: list[str]) -> Condition:
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.t5_tokens,
            device=self.device,
        )  # fmt: skip
        return {"states": states, "pooled": pooled}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Velocity (N, C, h, w) at time ``t`` (N,)."""
        return net(
            hidden_states=x_t,
            encoder_hidden_states=cond["states"],
            pooled_projections=cond["pooled"],
            timestep=self.schedule.native(t),
            return_dict=False,
        )[0]
