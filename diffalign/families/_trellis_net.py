"""The networks of TRELLIS's first stage (arXiv:2412.01506): a dense flow transformer and a convolutional VAE.

Module and parameter names are those of the published checkpoints, so that they load key for key. Only what a published
configuration uses is here: absolute positions, one token per latent voxel, channel-wise layer norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256  # size of the sinusoidal embedding of a time
PERIOD = 10_000


def _only(what: str, value: object, supported: object) -> None:
    if value != supported:
        raise ValueError(f"{what} {value!r} is not supported, only {supported!r}")


# --- flow transformer -----------------------------------------------------------------------------------------------


class TimestepEmbedder(nn.Module):
    """Sinusoids of a time, cosines first, through a two-layer MLP."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) float32 times -> (N, channels). Sinusoids of times near 1000 need float32."""
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(PERIOD) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        phase = t.float()[:, None] * rates
        return self.mlp(torch.cat([phase.cos(), phase.sin()], -1).to(dtype))


class HeadNorm(nn.Module):
    """Root-mean-square norm of every head of queries or keys, in float32."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, size))

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, heads, size), the same shape and type back."""
        return (F.normalize(x.float(), dim=-1) * self.gamma * x.shape[-1] ** 0.5).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context of ``context_channels``."""

    def __init__(self, channels: int, heads: int, *, head_norm: bool, context_channels: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.head_norm = head_norm
        if context_channels is None:
            self.to_qkv = nn.Linear(channels, 3 * channels)
        else:
            self.to_q = nn.Linear(channels, channels)
            self.to_kv = nn.Linear(context_channels, 2 * channels)
        if head_norm:
            self.q_rms_norm = HeadNorm(heads, channels // heads)
            self.k_rms_norm = HeadNorm(heads, channels // heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, L, channels), and (N, M, context_channels) to attend to -> (N, L, channels)."""
        if context is None:
            q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        else:
            q = self.to_q(x).unflatten(-1, (self.heads, -1))
            k, v = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        if self.head_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, GELU in its tanh form, linear."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        inner = int(channels * ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, channels), the same shape back."""
        return self.mlp(x)


def _modulation(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; the first and the last are scaled, shifted and gated by the time."""

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        ratio: float,
        *,
        share_mod: bool,
        head_norm: bool,
        head_norm_cross: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.norm3 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.self_attn = Attention(channels, heads, head_norm=head_norm)
        self.cross_attn = Attention(channels, heads, head_norm=head_norm_cross, context_channels=context_channels)
        self.mlp = FeedForward(channels, ratio)
        self.adaLN_modulation = None if share_mod else _modulation(channels)

    def forward(self, x: Tensor, mod: Tensor, context: Tensor) -> Tensor:
        """
        Args:
            x: (N, L, channels).
            mod: (N, channels) time, or (N, 6 channels) what it modulates with if all blocks share that.
            context: (N, M, context_channels).
        """
        mod = mod if self.adaLN_modulation is None else self.adaLN_modulation(mod)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = mod[:, None].chunk(6, -1)
        x = x + gate_attn * self.self_attn(self.norm1(x) * (1 + scale_attn) + shift_attn)
        x = x + self.cross_attn(self.norm2(x), context)
        return x + gate_mlp * self.mlp(self.norm3(x) * (1 + scale_mlp) + shift_mlp)


def positions(resolution: int, channels: int) -> Tensor:
    """(resolution^3, channels): sines and cosines of each of three grid coordinates, filled up with zeros."""
    count = channels // 6
    rates = PERIOD ** -(torch.arange(count, dtype=torch.float32) / count)
    axes = torch.meshgrid(*[torch.arange(resolution, dtype=torch.float32)] * 3, indexing="ij")
    phase = torch.stack(axes, -1).reshape(-1, 3, 1) * rates
    found = torch.cat([phase.sin(), phase.cos()], -1).flatten(1)
    return F.pad(found, (0, channels - found.shape[1]))


class SparseStructureFlowModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The velocity of a latent grid given a time and context tokens; arguments as in the published configurations.

    ``use_fp16`` and ``use_checkpoint`` are how the authors ran it: here the caller decides, with the type of the
    weights and ``enable_gradient_checkpointing``.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        resolution: int,
        in_channels: int,
        model_channels: int,
        cond_channels: int,
        out_channels: int,
        num_blocks: int,
        num_heads: int | None = None,
        num_head_channels: int = 64,
        mlp_ratio: float = 4,
        patch_size: int = 2,
        pe_mode: str = "ape",
        use_fp16: bool = False,
        use_checkpoint: bool = False,
        share_mod: bool = False,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
    ) -> None:
        super().__init__()
        _only("patch_size", patch_size, 1)
        _only("pe_mode", pe_mode, "ape")
        self.gradient_checkpointing = False
        self.t_embedder = TimestepEmbedder(model_channels)
        self.adaLN_modulation = _modulation(model_channels) if share_mod else None
        self.register_buffer("pos_emb", positions(resolution, model_channels))
        self.input_layer = nn.Linear(in_channels, model_channels)
        heads = num_heads or model_channels // num_head_channels
        norms = {"head_norm": qk_rms_norm, "head_norm_cross": qk_rms_norm_cross}
        self.blocks = nn.ModuleList(
            Block(model_channels, cond_channels, heads, mlp_ratio, share_mod=share_mod, **norms)
            for _ in range(num_blocks)
        )
        self.out_layer = nn.Linear(model_channels, out_channels)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, r, r, r) noisy latents.
            t: (N,) times from 0 to 1000.
            context: (N, M, cond_channels) image or text tokens.

        Returns:
            (N, out_channels, r, r, r) velocity ``eps - x0``.
        """
        h = self.input_layer(x.flatten(2).transpose(1, 2)) + self.pos_emb
        mod = self.t_embedder(t, x.dtype)
        if self.adaLN_modulation is not None:
            mod = self.adaLN_modulation(mod)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, mod, context)  # type: ignore[misc]
            else:
                h = block(h, mod, context)
        h = self.out_layer(F.layer_norm(h, h.shape[-1:]))
        return h.transpose(1, 2).unflatten(2, x.shape[2:])


# --- VAE ------------------------------------------------------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every voxel."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, ...), the same shape back."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class ResBlock3d(nn.Module):
    """Norm, SiLU and convolution, twice, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.norm2 = ChannelNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, r, r, r), the same shape back."""
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class DownsampleBlock3d(nn.Module):
    """Halves every side with a strided convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 2r, 2r, 2r) -> (N, out, r, r, r)."""
        return self.conv(x)


def pixel_shuffle_3d(x: Tensor) -> Tensor:
    """(N, 8 C, r, r, r) -> (N, C, 2r, 2r, 2r): eight channels are the eight voxels of a cube, last axis fastest."""
    x = x.unflatten(1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class UpsampleBlock3d(nn.Module):
    """Doubles every side with a convolution and a pixel shuffle."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, r, r, r) -> (N, out, 2r, 2r, 2r)."""
        return pixel_shuffle_3d(self.conv(x))


def _stages(channels: Sequence[int], blocks: int, resample: type[nn.Module]) -> nn.ModuleList:
    """Residual blocks of every width with a change of resolution between widths."""
    layers: list[nn.Module] = []
    for index, width in enumerate(channels):
        layers += [ResBlock3d(width) for _ in range(blocks)]
        layers += [resample(width, following) for following in channels[index + 1 : index + 2]]
    return nn.ModuleList(layers)


def _head(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(channels), nn.SiLU(), nn.Conv3d(channels, out_channels, 3, padding=1))


class SparseStructureEncoder(nn.Module):
    """Occupancy -> posterior of the latent grid; arguments as in the published configurations."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: Sequence[int],
        num_res_blocks_middle: int = 2,
        norm_type: str = "layer",
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        _only("norm_type", norm_type, "layer")
        self.input_layer = nn.Conv3d(in_channels, channels[0], 3, padding=1)
        self.blocks = _stages(channels, num_res_blocks, DownsampleBlock3d)
        self.middle_block = nn.Sequential(*(ResBlock3d(channels[-1]) for _ in range(num_res_blocks_middle)))
        self.out_layer = _head(channels[-1], 2 * latent_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, R, R, R) in {0, 1} -> mean and log-variance (N, latent_channels, r, r, r)."""
        h = self.input_layer(x)
        for block in self.blocks:
            h = block(h)
        mean, logvar = self.out_layer(self.middle_block(h)).chunk(2, 1)
        return mean, logvar


class SparseStructureDecoder(nn.Module):
    """Latent grid -> occupancy logits; arguments as in the published configurations."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: Sequence[int],
        num_res_blocks_middle: int = 2,
        norm_type: str = "layer",
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        _only("norm_type", norm_type, "layer")
        self.factor = 2 ** (len(channels) - 1)
        self.input_layer = nn.Conv3d(latent_channels, channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(*(ResBlock3d(channels[0]) for _ in range(num_res_blocks_middle)))
        self.blocks = _stages(channels, num_res_blocks, UpsampleBlock3d)
        self.out_layer = _head(channels[-1], out_channels)

    def forward(self, z: Tensor) -> Tensor:
        """(N, latent_channels, r, r, r) -> logits (N, 1, R, R, R)."""
        h = self.middle_block(self.input_layer(z))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h)
