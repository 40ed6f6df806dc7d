"""The Swin backbone of Mask2Former as mmdet builds it: the same attribute names, so that its weights load by name.

What differs from other Swins: query, key and value are one layer, patch merging orders its 4 C channels as
``nn.Unfold`` does (channel first, then the position in the 2x2 patch), and every stage has a norm of its own. Letters:
B images, H x W positions, C channels, N = window ^ 2 positions of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -100.0  # what attention between unconnected parts of a shifted window gets, as in training
MLP_RATIO = 4
PATCH = 4


class FeedForward(nn.Module):
    """Two linear layers under mmcv's names; the caller adds the residual."""

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), activation), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class WindowAttention(nn.Module):
    """Self-attention inside windows with a learned bias per relative position."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        dy, dx = (axis.reshape(-1, 1) - axis.reshape(1, -1) + window - 1 for axis in (y, x))
        self.register_buffer("relative_position_index", dy * (2 * window - 1) + dx)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``x`` is (B x windows, N, C), ``mask`` (windows, N, N) to be added."""
        n = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.reshape(1, n, n, self.heads).permute(0, 3, 1, 2)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(x), -1, -1, -1))
        return self.proj(out.transpose(1, 2).flatten(2))


class ShiftedWindows(nn.Module):
    """Cuts a map into windows (every second block: shifted by half a window) and attends inside each."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.w_msa = WindowAttention(width, heads, window)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same. Positions that pad the map to whole windows are attended to, as in training."""
        b, h, w, c = x.shape
        size = self.window
        x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
        padded = x.shape[1:3]
        mask = None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            mask = self._mask(padded, x)
        windows = self._cut(x).flatten(1, 2)
        windows = self.w_msa(windows, mask).reshape(b, padded[0] // size, padded[1] // size, size, size, c)
        x = windows.transpose(2, 3).reshape(b, *padded, c)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :h, :w]

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B x windows, window, window, C)."""
        b, h, w, c = x.shape
        size = self.window
        return x.reshape(b, h // size, size, w // size, size, c).transpose(2, 3).reshape(-1, size, size, c)

    def _mask(self, padded: Sequence[int], like: Tensor) -> Tensor:
        """(windows, N, N): positions that the roll brought together from opposite edges do not see each other."""
        parts = []
        for length in padded:
            part = torch.zeros(length, device=like.device, dtype=torch.long)
            part[length - self.window : length - self.shift] = 1
            part[length - self.shift :] = 2
            parts.append(part)
        kind = self._cut((parts[0][:, None] * 3 + parts[1])[None, :, :, None]).flatten(1)
        return (kind[:, None] != kind[:, :, None]).to(like.dtype) * MASKED


class Block(nn.Module):
    """Windowed attention and a feed-forward layer, each after its norm and with a residual."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = ShiftedWindows(width, heads, window, shift)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, MLP_RATIO * width, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PatchMerging(nn.Module):
    """2x2 positions become one with twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)."""
        _, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        return self.reduction(self.norm(x.permute(0, 1, 3, 5, 2, 4).flatten(3)))


class Stage(nn.Module):
    """Blocks of one resolution and, but for the last stage, the step to the next one."""

    def __init__(self, width: int, depth: int, heads: int, window: int, merges: bool) -> None:
        super().__init__()
        shifts = [window // 2 if index % 2 else 0 for index in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, window, shift) for shift in shifts)
        self.downsample = PatchMerging(width) if merges else None


class PatchEmbed(nn.Module):
    """4x4 pixels become one position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, PATCH, PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ceil(H / 4), ceil(W / 4), C)."""
        h, w = images.shape[2:]
        images = F.pad(images, (0, -w % PATCH, 0, -h % PATCH))
        return self.norm(self.projection(images).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Four maps with strides 4, 8, 16 and 32 and C, 2 C, 4 C and 8 C channels."""

    def __init__(self, width: int, depths: Sequence[int], heads: Sequence[int], window: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width)
        self.stages = nn.ModuleList(
            Stage(width * 2**level, depth, head, window, merges=level + 1 < len(depths))
            for level, (depth, head) in enumerate(zip(depths, heads, strict=True))
        )
        for level in range(len(depths)):
            self.add_module(f"norm{level}", nn.LayerNorm(width * 2**level))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps (B, C, H, W), the finest first."""
        x = self.patch_embed(images)
        maps = []
        for level, stage in enumerate(self.stages):
            for block in stage.blocks:  # type: ignore[union-attr]
                x = block(x)
            maps.append(self.get_submodule(f"norm{level}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)  # type: ignore[operator]
        return maps
