"""Small random checkpoints of learned scorers, in the published layouts, and the pictures they are tried on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPTS = ("a red cat", "two dogs on a mat", "a red cat")

CLIP = {  # an architecture of open_clip, small but for its vocabulary
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
REWARD = {
    "image": 32,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_heads": 2,
    "text_width": 24,
    "text_layers": 2,
    "text_heads": 2,
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "two", "dog", "##s", "on", "mat", ",", "very")


def picture(width: int, height: int, phase: int = 0) -> Image.Image:
    """A smooth gradient with fine stripes, so that every resize shows."""
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    red = 255 * x / max(width - 1, 1) + 0 * y
    green = 255 * y / max(height - 1, 1) + 0 * x
    blue = (37 * (x + phase) + 59 * y) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def pictures() -> list[Image.Image]:
    return [picture(50, 37), picture(37, 51, 5), picture(64, 64, 9)]


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights by name, the same in every release of every library: those near 1 are the scales of norms."""
    source = np.random.RandomState(seed)
    state = {}
    for name, shape in sorted(shapes.items()):
        values = source.standard_normal(shape)
        is_scale = len(shape) == 1 and name.endswith("weight")
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = 1 + 0.1 * values if is_scale else values * (0.1 if len(shape) < 2 else 1.5 / fan_in**0.5)
        state[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state


def shapes_of(net: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def clip_config(folder: Path, name: str = "tiny-ViT", **changes: Any) -> str:
    """Make open_clip know the architecture; its name."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**CLIP, **changes}))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


def clip_state(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights that :func:`random_state` gives an architecture of open_clip."""
    import open_clip

    state = random_state(shapes_of(open_clip.create_model(name)), seed)
    state["logit_scale"] = torch.tensor(2.5)
    return state


def stack_shapes(width: int, prefix: str = "layers.") -> dict[str, tuple[int, ...]]:
    """Of the linear stack of the aesthetic predictor and of ImageReward."""
    sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
    return {
        f"{prefix}{name}.{part}": (after, before) if part == "weight" else (after,)
        for name, (before, after) in sizes.items()
        for part in ("weight", "bias")
    }


def _linear(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def reward_shapes() -> dict[str, tuple[int, ...]]:
    """The names of ``ImageReward.pt`` with the shapes of :data:`REWARD`."""
    seen, read = REWARD["vision_width"], REWARD["text_width"]
    eye, text = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{eye}.cls_token": (1, 1, seen),
        f"{eye}.pos_embed": (1, 1 + (REWARD["image"] // 16) ** 2, seen),
        f"{eye}.patch_embed.proj.weight": (seen, 3, 16, 16),
        f"{eye}.patch_embed.proj.bias": (seen,),
        f"{text}.embeddings.word_embeddings.weight": (30524, read),
        f"{text}.embeddings.position_embeddings.weight": (512, read),
        **_norm(f"{eye}.norm", seen),
        **_norm(f"{text}.embeddings.LayerNorm", read),
        **_linear("blip.vision_proj", seen, 256),
        **_linear("blip.text_proj", read, 256),
        **stack_shapes(read, "mlp.layers."),
    }
    for n in range(REWARD["vision_layers"]):
        block = f"{eye}.blocks.{n}"
        shapes |= _norm(f"{block}.norm1", seen) | _norm(f"{block}.norm2", seen)
        shapes |= _linear(f"{block}.attn.qkv", seen, 3 * seen) | _linear(f"{block}.attn.proj", seen, seen)
        shapes |= _linear(f"{block}.mlp.fc1", seen, 4 * seen) | _linear(f"{block}.mlp.fc2", 4 * seen, seen)
    for n in range(REWARD["text_layers"]):
        layer = f"{text}.encoder.layer.{n}"
        for part, width in (("attention", read), ("crossattention", seen)):
            shapes |= _linear(f"{layer}.{part}.self.query", read, read)
            shapes |= _linear(f"{layer}.{part}.self.key", width, read)
            shapes |= _linear(f"{layer}.{part}.self.value", width, read)
            shapes |= _linear(f"{layer}.{part}.output.dense", read, read)
            shapes |= _norm(f"{layer}.{part}.output.LayerNorm", read)
        shapes |= _linear(f"{layer}.intermediate.dense", read, 4 * read)
        shapes |= _linear(f"{layer}.output.dense", 4 * read, read) | _norm(f"{layer}.output.LayerNorm", read)
    return shapes


def reward_state() -> dict[str, torch.Tensor]:
    """A state dict as in ``ImageReward.pt``."""
    state = random_state(reward_shapes())
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return state


def bert_tokenizer(folder: Path) -> Path:
    """A folder with a BERT tokenizer of a dozen words."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
