"""TRELLIS, first stage (arXiv:2412.01506): a flow on latents of 64^3 occupancy grids, from images or texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.families._trellis_files import (
    CLASSES,
    DECODER,
    ENCODER,
    FLOW,
    IMAGE,
    INDEX,
    TEXT,
    Sampler,
    load_parts,
    read_pipeline,
)
from diffalign.families.base import LatentFamily
from diffalign.foreign import PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX, foreign_files, write_peft
from diffalign.media import Size
from diffalign.networks import Loading
from diffalign.randomness import Generator
from diffalign.schedule import Density, Rectified
from diffalign.types import Condition

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VISIBLE, MARGIN = 0.8 * 255, 1.2


@dataclass(frozen=True)
class TrellisFlow(Rectified):
    """Rectified flow whose shift (``rescale_t``) is for sampling only; training times are ``sigmoid(1 + N(0, 1))``.

    The authors add ``1e-5 (1 - t) eps`` to x_t and take ``1e-5 eps`` off the target: left out here, as in DSO's code.
    """

    def sample_t(
        self,
        shape: tuple[int, ...],
        generator: Generator,
        *,
        density: Density = "logit_normal",
        mean: float = 1.0,
        std: float = 1.0,
    ) -> Tensor:
        """Training times: a density over t itself."""
        return Rectified().sample_t(shape, generator, density=density, mean=mean, std=std)


class Family(LatentFamily):
    """TRELLIS's sparse-structure stage behind the diffusion protocol: media are occupancies (N, 1, R, R, R).

    Guidance: the authors' strength g mixes ``(1 + g) c - g u``, so theirs of 7.5 is 8.5 here; it acts only at times
    within ``guidance_interval``. Latents are posterior means, on which the flow was trained. Axes are x, y, z; z is up.
    """

    name = "trellis"
    modality = "mesh"
    net_name = FLOW
    index_file = INDEX
    lora_file = PEFT_FILE
    lora_targets = ("to_q", "to_kv", "to_qkv", "to_out")
    reads_condition: bool = True
    """Whether conditions are images; False for the text models, which a checkpoint decides."""

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        tokenizer: Any,
        sampler: Sampler,
        source: str,
        device: torch.device,
    ) -> None:
        """``tokenizer``: of the text models, else None. ``sampler``: what the pipeline says about sampling."""
        super().__init__(parts, source, device)
        self.encoder: nn.Module = parts[ENCODER]
        self.decoder: Any = parts[DECODER]
        self.conditioner: Any = parts.get(IMAGE, parts.get(TEXT))
        self.tokenizer = tokenizer
        self.reads_condition = IMAGE in parts
        self.guidance_interval = sampler.interval
        self.schedule = TrellisFlow(shift=sampler.shift, even=True)

    @classmethod
    def load(cls, path: str, device: torch.device, loading: Loading = Loading()) -> Family:  # noqa: B008
        """Load from a folder in the published layout or a Hub id, safetensors only.

        Args:
            loading: of its ``parts``, ``image_cond_model`` or ``text_cond_model`` is a transformers folder or Hub id,
                the others a checkpoint without its ending.

        Raises:
            UserError: files are missing, broken or of another model.
        """
        args, sampler = read_pipeline(path)
        if loading.quant is not None:
            raise UserError("model.quant: trellis is not quantised; remove it")
        loaded, tokenizer = load_parts(path, args, loading.parts)
        loaded[FLOW].to(loading.torch_dtype)
        family = cls(loaded, tokenizer, sampler, path, device)
        family.dtype = loading.torch_dtype
        return family

    # --- occupancies --------------------------------------------------------------------------------------------

    @property
    def default_size(self) -> tuple[int, int]:
        """Voxels along two sides of the cube; the third has as many."""
        net: Any = self.net
        side = net.config.resolution * self.decoder.factor
        return side, side

    def sample_size(self, size: Size | None) -> Size:
        """The one size there is.

        Raises:
            UserError: another size was asked for.
        """
        if size is not None and tuple(size) != self.default_size:
            raise UserError(f"size {list(size)}: this {self.name} makes grids of {self.default_size[0]}^3 only")
        return self.default_size

    def latent_shape(self, size: Size | None) -> tuple[int, ...]:
        """(C, r, r, r) of a latent."""
        self.sample_size(size)
        config: Any = self.net.config
        return config.in_channels, *[config.resolution] * 3

    @torch.no_grad()
    def encode_media(self, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, R, R, R) in {0, 1} -> mean and log-variance of the VAE posterior."""
        return self.encoder(voxels.to(self.device))

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Network-space latents: the mean whatever the noise, as the flow was trained, and without a scale."""
        return mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Network-space latents -> occupancies (N, 1, R, R, R) in {0., 1.}."""
        return (self.decoder(latents) > 0).float()

    # --- conditions ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_condition(self, images: Sequence[Image.Image], size: Size | None = None) -> Condition:
        """Image tokens (N, 1 + registers + patches, C), whatever the size of what is made from them.

        An RGBA image with transparency is cropped around what is visible and laid over black, as the authors do; any
        other is taken as it is: their background removal with rembg is not done here.
        """
        side = self.conditioner.config.image_size
        pixels = torch.stack([_pixels(image, side) for image in images]).to(self.device)
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
        embedded = self.conditioner.embeddings((pixels - mean) / std)
        tokens = self.conditioner.encoder(embedded).last_hidden_state  # before the model's own final norm
        return {"tokens": nn.functional.layer_norm(tokens, tokens.shape[-1:])}

    def _encode(self, prompts: list[str]) -> Condition:
        if self.reads_condition:
            return {}
        length = self.conditioner.config.max_position_embeddings
        ids = self.tokenizer(
            prompts, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return {"tokens": self.conditioner(input_ids=ids.to(self.device)).last_hidden_state}

    @torch.no_grad()
    def blank_condition(self) -> Condition:
        """A condition of one sample, for its shapes."""
        return self.encode_condition([Image.new("RGB", (2, 2))]) if self.reads_condition else self._encode([""])

    def unconditional(self, cond: Condition) -> Condition:
        """The branch of guidance without the condition: zeros for an image, the empty prompt for a text."""
        if self.reads_condition:
            return {name: torch.zeros_like(value) for name, value in cond.items()}
        return self.encode_prompt([""] * len(cond["tokens"]))

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Velocity (N, C, r, r, r) at time ``t`` (N,)."""
        return net(x_t, self.schedule.native(t), cond["tokens"])

    # --- weights ------------------------------------------------------------------------------------------------

    def save_lora(self, folder: Path, net: nn.Module) -> None:
        """Write a PEFT adapter folder, which ``PeftModel.from_pretrained`` puts on the authors' network too."""
        write_peft(folder, net)

    def save_net(self, folder: Path, net: nn.Module) -> None:
        """Write full weights in the published layout: ``<name>.json`` and ``<name>.safetensors``."""
        from safetensors.torch import save_file

        config = {key: value for key, value in net.config.items() if not key.startswith("_")}  # type: ignore[union-attr]
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"name": CLASSES[FLOW], "args": config}, indent=4)
        (folder / f"{FLOW}.json").write_text(content, encoding="utf-8")
        save_file(
            {name: value.contiguous() for name, value in net.state_dict().items()}, folder / f"{FLOW}.safetensors"
        )

    def load_lora(self, folder: Path) -> None:
        """Put a PEFT adapter on the network."""
        from peft import PeftConfig, set_peft_model_state_dict
        from safetensors.torch import load_file

        for name in (self.lora_file, PEFT_CONFIG):  # without its config PEFT would look for the folder on the Hub
            if not (folder / name).is_file():
                raise UserError(f"model.adapter: {folder} holds no {name}")
        with foreign_files(f"model.adapter: {folder} does not fit this {self.name}"):
            state = load_file(folder / self.lora_file)
            self.net.add_adapter(PeftConfig.from_pretrained(str(folder)))  # type: ignore[operator]
            state = {key.removeprefix(PEFT_PREFIX): value for key, value in state.items()}
            unknown = set_peft_model_state_dict(self.net, state).unexpected_keys
        loaded = sum("lora_" in name for name, _ in self.net.named_parameters())
        if unknown or loaded != len(state):
            fitting = len(state) - len(unknown)
            raise UserError(
                f"model.adapter: {folder}: {fitting} of {len(state)} tensors fit the {loaded} of its config"
            )


# --- condition images -----------------------------------------------------------------------------------------------


def _pixels(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) in [0, 1]."""
    image = _cut_out(image, side) if _is_transparent(image) else image.convert("RGB")
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def _is_transparent(image: Image.Image) -> bool:
    return image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255


def _cut_out(image: Image.Image, side: int) -> Image.Image:
    """An RGBA image cropped to a square around its opaque pixels, with a margin, over black.

    Raises:
        UserError: nothing in it is opaque.
    """
    image = image.convert("RGBA")
    rows, columns = np.nonzero(np.asarray(image)[..., 3] > VISIBLE)
    extent = max(np.ptp(rows), np.ptp(columns)) if len(rows) else 0
    half = int(extent * MARGIN) // 2
    if half == 0:
        raise UserError("a condition image is transparent all over; there is nothing to make a shape of")
    x, y = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    box = (x - half, y - half, x + half, y + half)
    cropped = image.crop(box).resize((side, side), Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    values = np.asarray(cropped, dtype=np.float32) / 255
    return Image.fromarray((values[..., :3] * values[..., 3:] * 255).astype(np.uint8))
