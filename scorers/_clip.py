"""CLIP encoders: pictures and prompts as unit vectors, each encoded once, each network loaded once.

Two scorers that name the same weights on the same device in the same dtype get one encoder, which remembers the
vectors of the pictures that are still in use.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import UserError, nearest
from diffalign.scoring import Outcome, Sample, Score

from . import _pixels as px
from ._loading import Place, cuts, extra, fill, loading, read_tensors, refuse_misfit, score_pictures

Embed = Callable[[Any], Tensor]


class Encoder:
    """One CLIP.

    Args:
        prepare: a picture to (3, size, size) on the CPU.
        see: (N, 3, size, size) to (N, D).
        tokenize: N prompts to what ``read`` takes.
        read: tokens to (N, D).
        scale: ``exp(logit_scale)`` of the checkpoint.
    """

    def __init__(
        self,
        where: Place,
        *,
        prepare: Callable[[Image.Image], Tensor],
        see: Embed,
        tokenize: Callable[[list[str]], Any],
        read: Embed,
        scale: float,
    ) -> None:
        self.where, self.scale = where, scale
        self._prepare, self._see, self._tokenize, self._read = prepare, see, tokenize, read
        self._seen: dict[int, tuple[weakref.ref[Image.Image], Tensor]] = {}

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image], batch: int) -> Tensor:
        """(N, D) unit vectors in float32; a picture that was encoded before, by identity, is not encoded again."""
        new = list({id(image): image for image in images if self._recall(image) is None}.values())
        for some in cuts(new, batch):
            pixels = torch.stack([self._prepare(image) for image in some]).to(*self.where)
            for image, row in zip(some, F.normalize(self._see(pixels).float(), dim=-1), strict=True):
                self._remember(image, row.clone())
        return torch.stack([self._seen[id(image)][1] for image in images])

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str], batch: int) -> Tensor:
        """(N, D) unit vectors in float32; a prompt that is there several times is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        rows = torch.cat([self._read(self._tokenize(list(some))).float() for some in cuts(distinct, batch)])
        place = {prompt: index for index, prompt in enumerate(distinct)}
        return F.normalize(rows, dim=-1)[[place[prompt] for prompt in prompts]]

    def cosine(self, images: Sequence[Image.Image], prompts: Sequence[str], batch: int) -> list[float]:
        """The cosine of each picture with its own prompt."""
        return (self.images(images, batch) * self.texts(prompts, batch)).sum(-1).tolist()

    def _recall(self, image: Image.Image) -> Tensor | None:
        known = self._seen.get(id(image))
        return known[1] if known is not None and known[0]() is image else None

    def _remember(self, image: Image.Image, row: Tensor) -> None:
        key, seen = id(image), self._seen
        seen[key] = (weakref.ref(image, lambda _: seen.pop(key, None)), row)  # forgotten with the picture


@dataclass(frozen=True, slots=True)
class CosineScorer:
    """A scorer: ``value`` of the cosine of each picture with its prompt."""

    encoder: Encoder
    value: Callable[[float], float]
    batch: int
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        return score_pictures(samples, self._scores)

    def _scores(self, samples: Sequence[Sample]) -> Iterator[Score]:
        images: list[Any] = [sample.image for sample in samples]  # none is None: score_pictures leaves those out
        cosines = self.encoder.cosine(images, [sample.prompt for sample in samples], self.batch)
        return (Score(self.value(cosine)) for cosine in cosines)


_loaded: weakref.WeakValueDictionary[Hashable, Encoder] = weakref.WeakValueDictionary()


def _shared(key: Hashable, make: Callable[[], Encoder]) -> Encoder:
    """The encoder in use under this key, or a new one."""
    encoder = _loaded.get(key)
    if encoder is None:
        encoder = _loaded[key] = make()
    return encoder


def _identity(source: str) -> Hashable:
    """A tag or Hub id as it is; a file or folder by where it is and when it was written."""
    path = Path(source).expanduser()
    return (path.resolve(), path.stat().st_mtime_ns) if path.exists() else source


def open_clip_encoder(model: str, pretrained: str, where: Place) -> Encoder:
    """A CLIP by its open_clip names, with the picture preprocessing of its weights.

    Args:
        model: open_clip's name of the architecture, or ``hf-hub:owner/repo`` or ``local-dir:folder``.
        pretrained: open_clip's tag, or a file with the state dict; not read if ``model`` names a repository or folder.
    """
    whole = ":" in model
    name = model if whole else model.replace("/", "-")  # ViT-L/14 is ViT-L-14
    path = Path(pretrained).expanduser()
    file = path if path.is_file() and not whole else None

    def make() -> Encoder:
        net = _open_clip_folder(name) if whole else _open_clip(name, pretrained, file)
        return _open_clip_encoder(net, name, where, _published(net, name))

    return _shared(("open_clip", name, None if whole else _identity(pretrained), *where), make)


def hps_encoder(model: str, file: Path, where: Place) -> Encoder:
    """The CLIP of HPSv2: its state dict in open_clip's architecture, pictures resized whole and padded."""

    def make() -> Encoder:
        net = _open_clip(model, str(file), file)
        prepare = partial(px.resize_pad, size=_side(net))
        return _open_clip_encoder(net, model, where, lambda image: px.normalise(prepare(image)))

    return _shared(("hps", model, _identity(str(file)), *where), make)


def _open_clip(model: str, pretrained: str, file: Path | None) -> Any:
    """The network with its weights, on the CPU in float32; nothing is loaded in part."""
    open_clip = extra("open_clip")
    if model not in (known := open_clip.list_models()):
        raise UserError(f"model {model!r}: not one of open_clip{nearest(model, known)}")
    if file is None:
        tags = open_clip.list_pretrained_tags_by_model(model)
        if pretrained not in tags:
            raise UserError(
                f"pretrained {pretrained!r}: no such file, and no tag of {model}{nearest(pretrained, tags)}"
            )
        quick = open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False)
        with loading(f"{model} {pretrained}"):
            return open_clip.create_model(model, pretrained, force_quick_gelu=quick, require_pretrained=True)
    with _no_warnings(), loading(model):  # warnings that it starts from random weights
        net = open_clip.create_model(model, pretrained_text=False)
    state = {key.removeprefix("module."): value for key, value in read_tensors(file, "state_dict").items()}
    fill(net, state, file)
    return net


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Without what open_clip writes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _open_clip_folder(model: str) -> Any:
    """A network by ``hf-hub:`` or ``local-dir:``, which brings its own configuration."""
    with loading(model):
        return extra("open_clip").create_model(model, require_pretrained=True)


def _published(net: Any, model: str) -> Callable[[Image.Image], Tensor]:
    """The preprocessing that open_clip keeps with the weights."""
    config = net.visual.preprocess_cfg
    ways = {"shortest": px.resize_crop, "squash": px.squash}
    if config["resize_mode"] not in ways or config["interpolation"] not in px.RESAMPLE:
        raise UserError(f"{model}: pictures resized as {config['resize_mode']} {config['interpolation']} are not read")
    resize = partial(ways[config["resize_mode"]], size=_side(net), resample=config["interpolation"])
    return lambda image: px.normalise(resize(image), config["mean"], config["std"])


def _side(net: Any) -> int:
    """Pixels on a side of what the network sees."""
    size = net.visual.preprocess_cfg["size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[1]:
        raise UserError(f"a network that sees {sides[0]}x{sides[1]} pixels is not read: only squares are")
    return sides[0]


def _open_clip_encoder(net: Any, model: str, where: Place, prepare: Callable[[Image.Image], Tensor]) -> Encoder:
    with loading(f"the tokenizer of {model}"):
        tokenizer = extra("open_clip").get_tokenizer(model)
    net.eval().requires_grad_(False).to(*where)
    return Encoder(
        where,
        prepare=prepare,
        see=net.encode_image,
        tokenize=lambda prompts: tokenizer(prompts).to(where.device),
        read=net.encode_text,
        scale=float(net.logit_scale.float().exp()),
    )


def transformers_encoder(weights: str, tokenizer: str, where: Place) -> Encoder:
    """A ``CLIPModel`` of transformers, a folder or a Hub id; pictures as its first image processor prepared them."""
    key = ("transformers", _identity(weights), _identity(tokenizer), *where)
    return _shared(key, partial(_transformers, weights, tokenizer, where))


def _transformers(weights: str, tokenizer: str, where: Place) -> Encoder:
    with loading(weights):
        from transformers import CLIPModel

        loaded: Any = CLIPModel.from_pretrained(weights, dtype=torch.float32, output_loading_info=True)
    net, info = loaded
    left = [key for key in info["unexpected_keys"] if not key.endswith(".position_ids")]  # older releases saved it
    refuse_misfit({"missing": sorted(info["missing_keys"]), "unexpected": sorted(left)}, weights)
    with loading(tokenizer):
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(tokenizer)
    net.eval().requires_grad_(False).to(*where)
    length = net.config.text_config.max_position_embeddings
    size = net.config.vision_config.image_size
    pad = partial(words, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return Encoder(
        where,
        prepare=lambda image: px.normalise(px.resize_crop(image, size, down=True)),
        see=lambda pixels: _pooled(net.get_image_features(pixel_values=pixels)),
        tokenize=lambda prompts: pad(prompts).to(where.device),
        read=lambda tokens: _pooled(net.get_text_features(**tokens)),
        scale=float(net.logit_scale.float().exp()),
    )


def _pooled(features: Any) -> Tensor:
    """(N, D): transformers 5 wraps what it returned bare before."""
    return getattr(features, "pooler_output", features)
