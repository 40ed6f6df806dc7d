"""TRELLIS's first stage written down a second time: tables of tensors, and plain float64 formulas over them.

From the names and formulas of microsoft/TRELLIS (commit 6b0d647); nothing of the package is used.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

Table = dict[str, tuple[int, ...]]
Tensors = Mapping[str, Tensor]

IMAGE_LARGE = {
    "resolution": 16,
    "in_channels": 8,
    "out_channels": 8,
    "model_channels": 1024,
    "cond_channels": 1024,
    "num_blocks": 24,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 1,
    "pe_mode": "ape",
    "qk_rms_norm": True,
    "use_fp16": True,
}
TEXT_SIZES = {"model_channels": 768, "cond_channels": 768, "num_blocks": 12, "num_heads": 12}
TEXT_BASE = IMAGE_LARGE | TEXT_SIZES
TEXT_LARGE = IMAGE_LARGE | {"cond_channels": 768}
TEXT_XLARGE = TEXT_LARGE | {"model_channels": 1280, "num_blocks": 28, "qk_rms_norm_cross": True}
ENCODER = {
    "in_channels": 1,
    "latent_channels": 8,
    "num_res_blocks": 2,
    "num_res_blocks_middle": 2,
    "channels": [32, 128, 512],
    "use_fp16": True,
}
DECODER = {
    "out_channels": 1,
    "latent_channels": 8,
    "num_res_blocks": 2,
    "num_res_blocks_middle": 2,
    "channels": [512, 128, 32],
    "use_fp16": True,
}


# --- tables ---------------------------------------------------------------------------------------------------------


def _layer(name: str, *shape: int) -> Table:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def flow_table(args: Mapping[str, Any]) -> Table:
    """Name and shape of every tensor of a flow transformer's checkpoint."""
    c, ctx, inner = args["model_channels"], args["cond_channels"], int(args["model_channels"] * args["mlp_ratio"])
    shared = args.get("share_mod", False)
    table = {"pos_emb": (args["resolution"] ** 3, c)}
    table |= _layer("t_embedder.mlp.0", c, 256) | _layer("t_embedder.mlp.2", c, c)
    table |= _layer("input_layer", c, args["in_channels"]) | _layer("out_layer", args["out_channels"], c)
    for i in range(args["num_blocks"]):
        at = f"blocks.{i}"
        table |= _layer(f"{at}.self_attn.to_qkv", 3 * c, c) | _layer(f"{at}.self_attn.to_out", c, c)
        table |= _layer(f"{at}.cross_attn.to_q", c, c) | _layer(f"{at}.cross_attn.to_kv", 2 * c, ctx)
        table |= _layer(f"{at}.cross_attn.to_out", c, c) | _layer(f"{at}.norm2", c)
        table |= _layer(f"{at}.mlp.mlp.0", inner, c) | _layer(f"{at}.mlp.mlp.2", c, inner)
        for kind, option in (("self", "qk_rms_norm"), ("cross", "qk_rms_norm_cross")):
            if args.get(option, False):
                heads = (args["num_heads"], c // args["num_heads"])
                table |= {f"{at}.{kind}_attn.{side}_rms_norm.gamma": heads for side in "qk"}
        if not shared:
            table |= _layer(f"{at}.adaLN_modulation.1", 6 * c, c)
    return table | (_layer("adaLN_modulation.1", 6 * c, c) if shared else {})


def _res_block(at: str, c: int) -> Table:
    table = {}
    for n in (1, 2):
        table |= _layer(f"{at}.norm{n}", c) | _layer(f"{at}.conv{n}", c, c, 3, 3, 3)
    return table


def vae_table(args: Mapping[str, Any]) -> Table:
    """Name and shape of every tensor of an encoder's or a decoder's checkpoint."""
    widths, up = args["channels"], "out_channels" in args
    middle = widths[0] if up else widths[-1]
    table, at = {}, 0
    for i, c in enumerate(widths):
        for _ in range(args["num_res_blocks"]):
            table |= _res_block(f"blocks.{at}", c)
            at += 1
        if i + 1 < len(widths):
            size = (8 * widths[i + 1], c, 3, 3, 3) if up else (widths[i + 1], c, 2, 2, 2)
            table |= _layer(f"blocks.{at}.conv", *size)
            at += 1
    for i in range(args["num_res_blocks_middle"]):
        table |= _res_block(f"middle_block.{i}", middle)
    first = args["latent_channels"] if up else args["in_channels"]
    last = args["out_channels"] if up else 2 * args["latent_channels"]
    table |= _layer("input_layer", widths[0], first, 3, 3, 3) | _layer("out_layer.0", widths[-1])
    return table | _layer("out_layer.2", last, widths[-1], 3, 3, 3)


def write(stem: Path, kind: str, args: Mapping[str, Any], table: Table, seed: int) -> None:
    """A random checkpoint in the published layout; large matrices in half precision, as published."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in table.items():
        value = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) if len(shape) > 1 else 4)
        values[name] = value.half() if name.startswith("blocks.") and "norm" not in name else value
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.name}.json").write_text(json.dumps({"name": kind, "args": dict(args)}))
    save_file(values, stem.with_name(f"{stem.name}.safetensors"))


# --- formulas -------------------------------------------------------------------------------------------------------


def linear(w: Tensors, at: str, x: Tensor) -> Tensor:
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def affine(w: Tensors, at: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return normed(x, eps) * w[f"{at}.weight"] + w[f"{at}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def attend(w: Tensors, at: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """One head after the other."""
    outs = []
    for h in range(heads):
        one = slice(h * q.shape[-1] // heads, (h + 1) * q.shape[-1] // heads)
        a, b = q[..., one], k[..., one]
        if f"{at}.q_rms_norm.gamma" in w:
            root = a.shape[-1] ** 0.5
            a = root * a / a.norm(dim=-1, keepdim=True) * w[f"{at}.q_rms_norm.gamma"][h]
            b = root * b / b.norm(dim=-1, keepdim=True) * w[f"{at}.k_rms_norm.gamma"][h]
        score = (a @ b.mT / a.shape[-1] ** 0.5).exp()
        outs.append(score / score.sum(-1, keepdim=True) @ v[..., one])
    return torch.cat(outs, -1)


def flow(w: Tensors, args: Mapping[str, Any], x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The flow transformer; ``t`` from 0 to 1000."""
    heads, n, r = args["num_heads"], len(x), args["resolution"]
    h = torch.stack([x[:, :, i, j, k] for i in range(r) for j in range(r) for k in range(r)], 1)
    h = linear(w, "input_layer", h) + w["pos_emb"]
    phase = t[:, None] * torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    time = linear(w, "t_embedder.mlp.0", torch.cat([phase.cos(), phase.sin()], 1))
    time = linear(w, "t_embedder.mlp.2", silu(time))
    for i in range(args["num_blocks"]):
        at = f"blocks.{i}"
        mod = linear(w, "adaLN_modulation.1" if args.get("share_mod") else f"{at}.adaLN_modulation.1", silu(time))
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.reshape(n, 6, 1, -1).unbind(1)
        q, k, v = linear(w, f"{at}.self_attn.to_qkv", normed(h) * (1 + scale1) + shift1).chunk(3, -1)
        out = attend(w, f"{at}.self_attn", q, k, v, heads)
        h = h + gate1 * linear(w, f"{at}.self_attn.to_out", out)
        q = linear(w, f"{at}.cross_attn.to_q", affine(w, f"{at}.norm2", h))
        k, v = linear(w, f"{at}.cross_attn.to_kv", context).chunk(2, -1)
        h = h + linear(w, f"{at}.cross_attn.to_out", attend(w, f"{at}.cross_attn", q, k, v, heads))
        inner = linear(w, f"{at}.mlp.mlp.0", normed(h) * (1 + scale2) + shift2)
        inner = inner / 2 * (1 + (math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)).tanh())
        h = h + gate2 * linear(w, f"{at}.mlp.mlp.2", inner)
    return linear(w, "out_layer", normed(h, 1e-5)).mT.reshape(n, -1, r, r, r)


def positions(resolution: int, channels: int) -> Tensor:
    """The fixed ``pos_emb``: for x, then y, then z all sines and all cosines."""
    count = channels // 3 // 2
    rows = []
    for point in torch.cartesian_prod(*[torch.arange(resolution)] * 3).tolist():
        row = []
        for p in point:
            row += [math.sin(p / 10000 ** (i / count)) for i in range(count)]
            row += [math.cos(p / 10000 ** (i / count)) for i in range(count)]
        rows.append(row + [0.0] * (channels - len(row)))
    return torch.tensor(rows, dtype=torch.float64)


def _channel_norm(w: Tensors, at: str, x: Tensor) -> Tensor:
    return affine(w, at, x.movedim(1, -1), 1e-5).movedim(-1, 1)


def _conv(w: Tensors, at: str, x: Tensor, **kind: int) -> Tensor:
    return F.conv3d(x, w[f"{at}.weight"], w[f"{at}.bias"], **kind)


def _res(w: Tensors, at: str, x: Tensor) -> Tensor:
    h = x
    for n in (1, 2):
        h = _conv(w, f"{at}.conv{n}", silu(_channel_norm(w, f"{at}.norm{n}", h)), padding=1)
    return x + h


def _unfold(x: Tensor) -> Tensor:
    """Channel ``8 c + 4 a + 2 b + d`` of voxel (i, j, k) becomes channel c of voxel (2i + a, 2j + b, 2k + d)."""
    n, c, r = len(x), x.shape[1] // 8, x.shape[2]
    out = x.new_zeros(n, c, 2 * r, 2 * r, 2 * r)
    for a in (0, 1):
        for b in (0, 1):
            for d in (0, 1):
                out[:, :, a::2, b::2, d::2] = x[:, 4 * a + 2 * b + d :: 8]
    return out


def vae(w: Tensors, args: Mapping[str, Any], x: Tensor) -> Tensor:
    """The encoder (mean and log-variance as channels) or the decoder (logits)."""
    up = "out_channels" in args
    h = _conv(w, "input_layer", x, padding=1)

    def middle(h: Tensor) -> Tensor:
        for i in range(args["num_res_blocks_middle"]):
            h = _res(w, f"middle_block.{i}", h)
        return h

    h = middle(h) if up else h
    stages = sorted({int(name.split(".")[1]) for name in w if name.startswith("blocks.")})
    for i in stages:
        if f"blocks.{i}.conv1.weight" in w:
            h = _res(w, f"blocks.{i}", h)
        elif up:
            h = _unfold(_conv(w, f"blocks.{i}.conv", h, padding=1))
        else:
            h = _conv(w, f"blocks.{i}.conv", h, stride=2)
    h = h if up else middle(h)
    return _conv(w, "out_layer.2", silu(_channel_norm(w, "out_layer.0", h)), padding=1)


def dino(w: Tensors, pixels: Tensor, heads: int, eps: float) -> Tensor:
    """DINOv2 with registers before its final norm, then a layer norm without parameters; names of transformers."""
    patches = F.conv2d(
        pixels, w[f"{(p := 'embeddings.patch_embeddings.projection')}.weight"], w[f"{p}.bias"], stride=14
    )
    n, cls = len(pixels), w["embeddings.cls_token"]
    h = torch.cat([cls.expand(n, -1, -1), patches.flatten(2).mT], 1) + w["embeddings.position_embeddings"]
    h = torch.cat([h[:, :1], w["embeddings.register_tokens"].expand(n, -1, -1), h[:, 1:]], 1)
    layers = sorted({int(name.split(".")[2]) for name in w if name.startswith("encoder.layer.")})
    for i in layers:
        at = f"encoder.layer.{i}"
        x = affine(w, f"{at}.norm1", h, eps)
        q, k, v = (linear(w, f"{at}.attention.attention.{name}", x) for name in ("query", "key", "value"))
        out = linear(w, f"{at}.attention.output.dense", attend(w, at, q, k, v, heads))
        h = h + w[f"{at}.layer_scale1.lambda1"] * out
        x = linear(w, f"{at}.mlp.fc1", affine(w, f"{at}.norm2", h, eps))
        x = linear(w, f"{at}.mlp.fc2", x / 2 * (1 + (x / math.sqrt(2)).erf()))
        h = h + w[f"{at}.layer_scale2.lambda1"] * x
    return normed(h, 1e-5)
