"""HPSv3's network (arXiv:2508.03789): Qwen2-VL and a head on what it makes of one special token; its input."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError

from ._loading import fill, loading, read_tensors, refuse_misfit
from ._pixels import CLIP_MEAN, CLIP_STD

TOKEN = "<|Reward|>"
PLACE = "<|image_pad|>"  # one for each patch of a picture, in Qwen2-VL's chat template
PIXELS = 256 * 28 * 28  # of every picture, about
WORDING = ("INSTRUCTION", "prompt_with_special_token")
LAYOUTS = (("visual.", "visual."), ("model.visual.", "visual."), ("model.language_model.", "language_model."))
"""Published prefix -> ours; ``model.`` alone is the language model in files of transformers before 4.52."""


class RewardNet(nn.Module):
    """Chats with one picture each to the mean and the log standard deviation of a score."""

    def __init__(self, body: Any, width: int) -> None:
        super().__init__()
        self.body = body
        self.rm_head = nn.Sequential(
            *(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05)),
            *(nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)),
        )

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor, grids: Tensor, token: int) -> Tensor:
        """(N, 2) in float32 from (N, L) token ids with their mask, the patches of all pictures and (N, 3) grids.

        Positions count tokens, those of pictures too: the released forward pass never tells the language model where
        the pictures are.
        """
        count, length = ids.shape
        positions = torch.arange(length, device=ids.device).expand(3, count, length)
        states = self.body(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=pixels,
            image_grid_thw=grids,
            use_cache=False,
        ).last_hidden_state
        last = length - 1 - (ids == token).int().flip(1).argmax(1)  # a prompt might contain the token, too
        return self.rm_head(states[torch.arange(count, device=ids.device), last].float())


def load_net(file: Path, config: Any, dtype: torch.dtype) -> RewardNet:
    """The network from the published state dict; of the base model its configuration alone.

    Raises:
        UserError: the file does not fit.
    """
    from transformers import Qwen2VLModel

    body, head = _split(read_tensors(file, "model"))
    words = body.get("language_model.embed_tokens.weight")
    if words is not None:
        config.text_config.vocab_size = len(words)  # the published one is shortened to the tokenizer's words
    with loading(str(file)):
        loaded: Any = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=body, dtype=dtype, output_loading_info=True
        )
    net, info = loaded
    refuse_misfit({"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}, file)
    reward = RewardNet(net, config.text_config.hidden_size)
    fill(nn.ModuleDict({"rm_head": reward.rm_head}), head, file)
    return reward


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What goes into the body under its names, and the head; the language model's own head is not read."""
    body, head = {}, {}
    for key, value in state.items():
        if key.startswith("rm_head."):
            head[key] = value.float()
        elif key != "lm_head.weight":
            ours = next((new + key.removeprefix(old) for old, new in LAYOUTS if key.startswith(old)), None)
            body[ours or key.replace("model.", "language_model.", 1)] = value
    return body, head


def read_wording(path: Path) -> str:
    """What the network was trained to be asked, with ``{text_prompt}`` in it: two strings of a Python file, not run.

    Raises:
        UserError: the file does not define them as plain strings.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    found = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    missing = [name for name in WORDING if name not in found]
    if missing:
        raise UserError(f"{path}: defines no string {' or '.join(missing)}")
    wording = found[WORDING[0]] + found[WORDING[1]]
    if found[WORDING[0]].count("{text_prompt}") != 1 or found[WORDING[1]].count(TOKEN) != 1:
        raise UserError(f"{path}: expected one {{text_prompt}} in {WORDING[0]} and one {TOKEN} in {WORDING[1]}")
    return wording


def fit_pixels(image: Image.Image, side: int) -> Image.Image:
    """The picture with sides that are multiples of ``side`` and about :data:`PIXELS` pixels, in its proportions."""
    sides = [max(side, round(length / side) * side) for length in image.size]
    area, rounded = image.size[0] * image.size[1], sides[0] * sides[1]
    if rounded > PIXELS:
        shrink = math.sqrt(area / PIXELS)
        sides = [max(side, math.floor(length / shrink / side) * side) for length in image.size]
    elif rounded < PIXELS:
        grow = math.sqrt(PIXELS / area)
        sides = [math.ceil(length * grow / side) * side for length in image.size]
    return image.convert("RGB").resize((sides[0], sides[1]), Image.Resampling.BICUBIC)


class Chats:
    """Prompts and pictures to the network's input."""

    def __init__(self, tokenizer: Any, vision: Any, wording: str) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer, self.wording = tokenizer, wording
        tokenizer.padding_side = "right"
        tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
        self.token = tokenizer.convert_tokens_to_ids(TOKEN)
        self.merge = vision.spatial_merge_size
        self.side = vision.patch_size * self.merge
        self.patches = Qwen2VLImageProcessorPil(
            do_resize=False,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=self.merge,
        )

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The arguments of :meth:`RewardNet.forward` but for the token, on the CPU."""
        seen = self.patches([fit_pixels(image, self.side) for image in images], return_tensors="pt")
        grids = seen["image_grid_thw"]
        counts = (grids.prod(-1) // self.merge**2).tolist()
        texts = [self._chat(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        words = self.tokenizer(texts, padding=True, return_tensors="pt")
        return {
            "ids": words["input_ids"],
            "mask": words["attention_mask"],
            "pixels": seen["pixel_values"],
            "grids": grids,
        }

    def _chat(self, prompt: str, count: int) -> str:
        text = self.wording.replace("{text_prompt}", prompt)
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return chat.replace(PLACE, PLACE * count, 1)
