"""Mask2Former with a Swin-S backbone for COCO instances, in plain torch and under mmdet's names (arXiv:2112.01527).

GenEval's thresholds belong to the weights that mmdet published as ``CHECKPOINT``. Letters:
B images, Q queries, C channels, S positions of all levels together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError

from ._mask2former_swin import FeedForward, Swin

CHECKPOINT = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
GROUPS = 32  # of every group norm
LEVELS = 3  # maps that both transformers read: strides 32, 16 and 8, in this order


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a network; the defaults are those of the published checkpoint."""

    embed: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    width: int = 256
    attention_heads: int = 8
    points: int = 4
    encoder_layers: int = 6
    encoder_hidden: int = 1024
    decoder_layers: int = 9
    decoder_hidden: int = 2048
    queries: int = 100
    classes: int = 80


def sine_positions(h: int, w: int, width: int, like: Tensor) -> Tensor:
    """(width, h, w): the first half of the channels tells y, the second x, both scaled to (0, 2 pi]."""
    half = width // 2
    index = torch.arange(half, device=like.device)
    wavelength = 10000 ** (2 * (index // 2).to(like.dtype) / half)

    def encode(length: int) -> Tensor:
        place = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
        angle = (place / (place[-1] + 1e-6) * 2 * math.pi)[:, None] / wavelength
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)  # (length, half)

    y, x = encode(h)[:, None].expand(h, w, half), encode(w)[None].expand(h, w, half)
    return torch.cat([y, x], -1).permute(2, 0, 1)


class ConvNorm(nn.Module):
    """Convolution and group norm under mmcv's names."""

    def __init__(self, inputs: int, width: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=bias)
        self.gn = nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(self.conv(x))


class DeformableAttention(nn.Module):
    """Every position reads a few learned places of every level, by bilinear sampling (arXiv:2010.04159)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.points = sizes.attention_heads, sizes.points
        places = sizes.attention_heads * LEVELS * sizes.points
        self.sampling_offsets = nn.Linear(sizes.width, 2 * places)
        self.attention_weights = nn.Linear(sizes.width, places)
        self.value_proj = nn.Linear(sizes.width, sizes.width)
        self.output_proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor, positions: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """``x`` (B, S, C), ``reference`` (S, 2) as x and y in [0, 1], ``shapes`` (h, w) per level -> (B, S, C)."""
        b, s, _ = x.shape
        query = x + positions
        offsets = self.sampling_offsets(query).reshape(b, s, self.heads, LEVELS, self.points, 2)
        weights = self.attention_weights(query).reshape(b, s, self.heads, LEVELS * self.points).softmax(-1)
        values = self.value_proj(x).reshape(b, s, self.heads, -1).split([h * w for h, w in shapes], 1)
        read = []
        for level, (h, w) in enumerate(shapes):
            scale = offsets.new_tensor([w, h])
            grid = 2 * (reference[:, None, None] + offsets[:, :, :, level] / scale) - 1
            image = values[level].permute(0, 2, 3, 1).reshape(b * self.heads, -1, h, w)
            grid = grid.transpose(1, 2).flatten(0, 1)  # (B x heads, S, points, 2)
            read.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        weights = weights.transpose(1, 2).reshape(b * self.heads, 1, s, LEVELS * self.points)
        out = (torch.cat(read, -1) * weights).sum(-1)  # (B x heads, C / heads, S)
        return self.output_proj(out.reshape(b, -1, s).transpose(1, 2))


class EncoderLayer(nn.Module):
    """Deformable attention over all levels and a feed-forward layer, each followed by its norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([DeformableAttention(sizes)])
        self.ffns = nn.ModuleList([FeedForward(sizes.width, sizes.encoder_hidden, nn.ReLU())])
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in range(2))

    def forward(self, x: Tensor, positions: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        x = self.norms[0](x + self.attentions[0](x, positions, reference, shapes))
        return self.norms[1](x + self.ffns[0](x))


class Layers(nn.Module):
    """A stack of layers and, in the decoder, the norm before every prediction, under mmcv's names."""

    def __init__(self, layers: Sequence[nn.Module], post_norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if post_norm is not None:
            self.post_norm = post_norm


class PixelDecoder(nn.Module):
    """Backbone maps -> the map that masks are read from (stride 4) and three maps to attend to."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels = [sizes.embed * 2**level for level in range(LEVELS + 1)]
        self.input_convs = nn.ModuleList(ConvNorm(c, sizes.width, 1, bias=True) for c in channels[:0:-1])
        self.encoder = Layers([EncoderLayer(sizes) for _ in range(sizes.encoder_layers)])
        self.level_encoding = nn.Embedding(LEVELS, sizes.width)
        self.lateral_convs = nn.ModuleList([ConvNorm(channels[0], sizes.width, 1, bias=False)])
        self.output_convs = nn.ModuleList([ConvNorm(sizes.width, sizes.width, 3, bias=False)])
        self.mask_feature = nn.Conv2d(sizes.width, sizes.width, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        finest, coarse = maps[0], maps[:0:-1]
        shapes = [(x.shape[2], x.shape[3]) for x in coarse]
        inputs, positions, reference = [], [], []
        for level, (x, (h, w)) in enumerate(zip(coarse, shapes, strict=True)):
            x = self.input_convs[level](x)
            inputs.append(x.flatten(2))
            sine = sine_positions(h, w, x.shape[1], x)
            positions.append((sine + self.level_encoding.weight[level][:, None, None]).flatten(1))
            ys, xs = ((torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) / n for n in (h, w))
            y, x_ = torch.meshgrid(ys, xs, indexing="ij")
            reference.append(torch.stack([x_, y], -1).flatten(0, 1))
        x, places = torch.cat(inputs, 2).transpose(1, 2), torch.cat(reference)
        where = torch.cat(positions, 1).T
        for layer in self.encoder.layers:
            x = layer(x, where, places, shapes)
        split = x.transpose(1, 2).split([h * w for h, w in shapes], 2)
        outs = [part.unflatten(2, shape) for part, shape in zip(split, shapes, strict=True)]
        fine = self.lateral_convs[0](finest)
        fine = fine + F.interpolate(outs[-1], fine.shape[2:], mode="bilinear", align_corners=False)
        return self.mask_feature(self.output_convs[0](fine).relu()), outs


class Attention(nn.Module):
    """torch's multi-head attention under mmcv's name."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(sizes.width, sizes.attention_heads, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attn(query, key, value, attn_mask=mask, need_weights=False)[0]


class DecoderLayer(nn.Module):
    """Attention to the image inside the predicted masks, attention among queries, a feed-forward layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention(sizes) for _ in range(2))
        self.ffns = nn.ModuleList([FeedForward(sizes.width, sizes.decoder_hidden, nn.ReLU())])
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in range(3))

    def forward(self, x: Tensor, places: Tensor, image: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """``x`` and ``places`` (B, Q, C), ``image`` (B, S, C), ``mask`` (B x heads, Q, S), true where not to look."""
        x = self.norms[0](x + self.attentions[0](x + places, image + positions, image, mask))
        x = self.norms[1](x + self.attentions[1](x + places, x + places, x))
        return self.norms[2](x + self.ffns[0](x))


class Head(nn.Module):
    """Pixel decoder and masked-attention decoder: maps -> a class and a mask per query."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.attention_heads
        self.pixel_decoder = PixelDecoder(sizes)
        layers = [DecoderLayer(sizes) for _ in range(sizes.decoder_layers)]
        self.transformer_decoder = Layers(layers, post_norm=nn.LayerNorm(width))
        self.query_embed = nn.Embedding(sizes.queries, width)
        self.query_feat = nn.Embedding(sizes.queries, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        self.cls_embed = nn.Linear(width, sizes.classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, classes + 1; the last means nothing) and mask logits (B, Q, H / 4, W / 4)."""
        features, levels = self.pixel_decoder(maps)
        images, positions = [], []
        for level, x in enumerate(levels):
            images.append(x.flatten(2).transpose(1, 2) + self.level_embed.weight[level])
            positions.append(sine_positions(x.shape[2], x.shape[3], x.shape[1], x).flatten(1).T)
        x = self.query_feat.weight.expand(len(features), -1, -1)
        places = self.query_embed.weight.expand(len(features), -1, -1)
        classes, masks = self._predict(x, features)
        for index, layer in enumerate(self.transformer_decoder.layers):
            level = index % LEVELS
            hidden = self._hidden(masks, levels[level].shape[2:])
            x = layer(x, places, images[level], positions[level], hidden)
            classes, masks = self._predict(x, features)
        return classes, masks

    def _predict(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transformer_decoder.post_norm(x)
        return self.cls_embed(x), torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), features)

    def _hidden(self, masks: Tensor, size: Sequence[int]) -> Tensor:
        """(B x heads, Q, S): outside a query's mask. A query whose mask is empty sees everything."""
        resized = F.interpolate(masks, tuple(size), mode="bilinear", align_corners=False)
        hidden = resized.sigmoid().flatten(2) < 0.5
        hidden = hidden & ~hidden.all(-1, keepdim=True)
        return hidden.repeat_interleave(self.heads, 0)


class Mask2Former(nn.Module):
    """(B, 3, H, W) normalised images -> class logits (B, Q, classes + 1), mask logits (B, Q, H / 4, W / 4)."""

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        sizes = sizes or Sizes()
        self.backbone = Swin(sizes.embed, sizes.depths, sizes.heads, sizes.window)
        self.panoptic_head = Head(sizes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.panoptic_head(self.backbone(images))


def load(path: str | Path, sizes: Sizes | None = None) -> Mask2Former:
    """The detector with mmdet's weights, ready to run: a ``.pth`` with a ``state_dict``, or safetensors.

    Raises:
        UserError: there is no such file, only running code could read it, or it holds another network's weights.
    """
    path = Path(path)
    state = _read(path)
    with torch.device("meta"):
        net = Mask2Former(sizes)
    own = net.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong = wrong or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise UserError(f"{path}: not the weights of mmdet 2's Mask2Former with Swin-S: {wrong[0]} does not fit")
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; GenEval's detector is mmdet's {CHECKPOINT}.pth")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # junk raises whatever its bytes happen to mean
        raise UserError(
            f"{path}: holds more than tensors and plain values, or is broken; where you trust it, "
            "load it with weights_only=False and save its 'state_dict' as safetensors"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
