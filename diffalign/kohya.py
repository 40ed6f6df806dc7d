"""A LoRA in the naming of kohya-ss/sd-scripts, which ComfyUI and most other programs read.

A layer is ``<name>.lora_down.weight``, ``<name>.lora_up.weight`` and ``<name>.alpha``, where the update is
``alpha / rank * up @ down``. The name is ``lora_unet_`` and the module's own, with underscores for dots: for SD as
diffusers calls the module, for SDXL as the original UNet does, for FLUX as the original transformer does. SD3 has no
such naming of its own that is read everywhere: ComfyUI reads the names of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.weights import LoraLayer, lora_layers

PREFIX = "lora_unet_"

RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
RESNET |= {"conv_shortcut": "skip_connection"}
OUTSIDE = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
OUTSIDE |= {f"time_embedding.linear_{n}": f"time_embed.{2 * n - 2}" for n in (1, 2)}
OUTSIDE |= {f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)}

DOUBLE = {
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp_0",
    "ff.net.2": "img_mlp_2",
    "ff_context.net.0.proj": "txt_mlp_0",
    "ff_context.net.2": "txt_mlp_2",
    "norm1.linear": "img_mod_lin",
    "norm1_context.linear": "txt_mod_lin",
}
SINGLE = {"proj_out": "linear2", "norm.linear": "modulation_lin"}
FUSED = {
    "transformer_blocks": {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_transformer_blocks": {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}
"""Linear layers that the original FLUX has as one: its name, and its parts in order."""


def check(family: str) -> None:
    """Refuse a family without such a naming."""
    if family not in CONVERTERS:
        raise UserError(f"format: kohya has no naming for {family}, only for {', '.join(CONVERTERS)}; use lora or peft")


def convert(family: str, net: nn.Module) -> dict[str, Tensor]:
    """The LoRA on a network of that family as kohya's tensors.

    Raises:
        UserError: a module that has a LoRA has no name there.
    """
    return CONVERTERS[family](net)


def _tensors(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    key = PREFIX + name.replace(".", "_")
    alpha = torch.tensor(float(layer.scale * len(layer.down)))
    return {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up, f"{key}.alpha": alpha}


def _named(net: nn.Module, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Layer by layer, each under its new name."""
    layers = lora_layers(net).items()
    return {key: value for name, layer in layers for key, value in _tensors(rename(name), layer).items()}


def _sd(net: nn.Module) -> dict[str, Tensor]:
    return _named(net, str)


def _sdxl(net: Any) -> dict[str, Tensor]:
    per_block: int = net.config.layers_per_block
    return _named(net, lambda name: _sgm_name(name, per_block))


def _sgm_name(name: str, per_block: int) -> str:
    """What the original SDXL calls a module of the diffusers UNet; ``per_block`` resnets in every down block."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.([a-z]+)\.(\d+)\.(.+)", name)
    if found is None:
        raise _unnamed("sdxl", name)
    side, block, kind, index, inner = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        inner = RESNET.get(inner, inner)
    if side is None:
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{inner}"
    place = block * (per_block + 1) + index
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (per_block + 1)}.0.op"
        return f"input_blocks.{place + 1}.{int(kind == 'attentions')}.{inner}"
    if kind == "upsamplers":
        return f"output_blocks.{place + per_block}.2.{inner}"
    return f"output_blocks.{place}.{int(kind == 'attentions')}.{inner}"


def _sd3(net: nn.Module) -> dict[str, Tensor]:
    """No alpha: the scale goes into ``lora_B``, so that every reader uses 1."""
    out = {}
    for name, layer in lora_layers(net).items():
        out[f"transformer.{name}.lora_A.weight"] = layer.down
        out[f"transformer.{name}.lora_B.weight"] = layer.up * layer.scale
    return out


def _flux(net: nn.Module) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    layers = lora_layers(net)
    by_block: dict[tuple[str, str], dict[str, LoraLayer]] = {}
    for name, layer in layers.items():
        found = re.fullmatch(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)", name)
        if found is None:
            raise _unnamed("flux", name)
        by_block.setdefault((found[1], found[2]), {})[found[3]] = layer
    for (kind, index), inside in by_block.items():
        single = kind.startswith("single")
        prefix = f"{'single' if single else 'double'}_blocks.{index}"
        for fused, parts in FUSED[kind].items():
            if inside.keys() & set(parts):
                linear: Any = [net.get_submodule(f"{kind}.{index}.{part}") for part in parts]
                widths = [module.out_features for module in linear]
                out |= _tensors(f"{prefix}.{fused}", fuse([inside.pop(part, None) for part in parts], widths))
        names = SINGLE if single else DOUBLE
        for name, layer in inside.items():
            if name not in names:
                raise _unnamed("flux", f"{kind}.{index}.{name}")
            out |= _tensors(f"{prefix}.{names[name]}", layer)
    return out


def fuse(parts: list[LoraLayer | None], widths: list[int]) -> LoraLayer:
    """One exact LoRA for linear layers that share an input and are stacked into one: block-diagonal ``up``.

    A part without a LoRA gets zeros of the same rank, so that the blocks are equal and stock diffusers, which looks
    for that, splits them into what they were made of. Scales go into ``up``.
    """
    present = [part for part in parts if part is not None]
    rank, like = max(len(part.down) for part in present), present[0]
    empty = like.down.new_zeros(rank, like.down.shape[1])
    down = torch.cat([empty if part is None else part.down for part in parts])
    blocks = [
        like.up.new_zeros(width, rank) if part is None else part.up * part.scale
        for part, width in zip(parts, widths, strict=True)
    ]
    return LoraLayer(down, torch.block_diag(*blocks), 1.0)


def _unnamed(family: str, name: str) -> UserError:
    return UserError(f"format: kohya has no name for the LoRA on {name} of a {family}; use lora or peft")


CONVERTERS: Mapping[str, Callable[[Any], dict[str, Tensor]]] = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}
