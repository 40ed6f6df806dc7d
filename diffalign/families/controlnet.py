"""ControlNets (arXiv:2302.05543) of Stable Diffusion 1.x, 2.x and XL and of FLUX.1: the ControlNet alone trains."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.families import flux, sd, sdxl
from diffalign.families._pipeline import DiffusersFamily
from diffalign.foreign import LORA_FILE, adapter_settings, reading_lora
from diffalign.media import Size
from diffalign.networks import Loading
from diffalign.types import Condition, Request

SETTINGS = "lora_adapter_metadata"  # where diffusers looks for those of a LoRA, in the header of its file


class Steered(nn.Module):
    """A network with what a ControlNet adds to its blocks, called as the network alone is.

    Args:
        control: the ControlNet; it reads what the network reads, and more.
        network: what makes the prediction.
        reads: arguments of the ControlNet beside the network's, or instead of them.
        takes: arguments of the network for the two things that the ControlNet returns.
        options: more arguments of the network.
    """

    def __init__(
        self,
        control: nn.Module,
        network: nn.Module,
        reads: Mapping[str, Any],
        takes: tuple[str, str],
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.control, self.network = control, network
        self.reads, self.takes, self.options = reads, takes, options

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output."""
        added = self.control(*args, **{**kwargs, **self.reads})
        return self.network(*args, **kwargs, **self.options, **dict(zip(self.takes, added, strict=True)))


class Steering(DiffusersFamily):
    """What the three kinds share, mixed into the family of the network that the ControlNet steers.

    Gradients run through that network, which stays frozen. A condition image is stretched to the size of the sample, as
    the stock pipelines do it; for training it is first cut as its sample is. Both branches of classifier-free guidance
    see it (no guess mode).
    """

    name = "controlnet"
    net_name = "controlnet"
    reads_condition = True
    aligned_condition = True
    conditioning_scale: float = 1.0
    """What the ControlNet adds is multiplied with: ``controlnet_conditioning_scale`` of the stock pipelines."""
    base: ClassVar[str]
    """The stock pipeline without a ControlNet, which then comes as one of ``model.parts``."""
    kind: ClassVar[str]
    """Class of the ControlNet."""
    steers: ClassVar[str]
    """The component that makes the prediction."""
    takes: ClassVar[tuple[str, str]]
    """Its arguments for what the ControlNet returns."""
    shared: ClassVar[tuple[str, ...]]
    """Settings that both must have alike."""
    refused: ClassVar[dict[str, tuple[Any, str]]]
    """Setting of a ControlNet -> the one value it may have, and what others are."""

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        found = type(pipe.controlnet).__name__
        if found != self.kind:
            raise UserError(f"model.path: the controlnet of {source} is a {found}; {self.name} needs one {self.kind}")
        mine, other = pipe.controlnet.config, getattr(pipe, self.steers).config
        for setting, (wanted, what) in self.refused.items():
            if mine[setting] != wanted:
                raise UserError(f"model.path: the controlnet of {source} has {setting} {mine[setting]!r}: no {what}")
        for setting in self.shared:
            values = [tuple(v) if isinstance(v, list) else v for v in (mine[setting], other[setting])]
            if values[0] != values[1]:
                raise UserError(
                    f"model.path: the controlnet of {source} is for another model: its {setting} is {values[0]!r}, and "
                    f"{values[1]!r} that of the {self.steers}"
                )
        super().__init__(pipe, source, device)
        self.network_options: dict[str, Any] = {}

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The ControlNet, and the network it steers."""
        return self.net, self._parts[self.steers]

    # --- loading ------------------------------------------------------------------------------------------------

    @classmethod
    def variant(cls, pipeline: str | None) -> type[DiffusersFamily]:
        """By what the ControlNet of a checkpoint steers.

        Raises:
            UserError: neither a ControlNet pipeline of these models nor a base one.
        """
        kinds = {name: kind for kind in (Family, XL, Flux) for name in (kind.pipeline, kind.base)}
        if pipeline not in kinds:
            raise UserError(f"model.path: is a {pipeline}; {cls.name} is for {', '.join(kinds)}")
        return kinds[pipeline]

    @classmethod
    def load(cls, path: str, device: torch.device, loading: Loading = Loading()) -> DiffusersFamily:  # noqa: B008
        """Load a stock ControlNet pipeline, or its base pipeline and ``controlnet`` from the parts of ``loading``."""
        if loading.quant is not None:
            raise UserError(f"model.quant: the network of a {cls.name} is not quantised; remove it")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # diffusers' of its FluxControlNetModel
            return super().load(path, device, loading)

    @classmethod
    def part_class(cls, name: str, path: str) -> Any:
        """The class of a component; the index of a base pipeline lists no ControlNet."""
        if name != cls.net_name:
            return super().part_class(name, path)
        import diffusers

        return getattr(diffusers, cls.kind)

    # --- conditions ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_condition(self, images: Sequence[Image.Image], size: Size) -> Condition:
        """``control`` (N, 3, H, W): the pixels, 0 to 255 in uint8 to keep caches small."""
        return {"control": torch.stack([pixels(image, size) for image in images]).to(self.device)}

    @torch.no_grad()
    def blank_condition(self) -> Condition:
        """A condition of one sample of the default size, for its shapes."""
        return {**super().blank_condition(), **self.encode_condition([Image.new("RGB", (2, 2))], self.default_size)}

    def reads(self, x_t: Tensor, t: Tensor, cond: Condition) -> dict[str, Any]:
        """What the ControlNet reads beside what the network reads, or instead of it."""
        return {"controlnet_cond": cond["control"].to(x_t.dtype) / 255, "conditioning_scale": self.conditioning_scale}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The output of the network behind the ControlNet ``net``."""
        reads, network = self.reads(x_t, t, cond), self.networks[-1]
        steered = Steered(net, network, reads, self.takes, self.network_options)
        return super().predict(steered, x_t, t, cond)

    # --- adapters -----------------------------------------------------------------------------------------------

    def save_lora(self, folder: Path, net: nn.Module) -> None:
        """Write ``pytorch_lora_weights.safetensors`` as stock ``save_lora_adapter`` does.

        No pipeline reads a LoRA of a ControlNet: ``pipe.controlnet.load_lora_adapter(folder, prefix=None,
        use_safetensors=True)`` does.
        """
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        state = {key: v.contiguous() for key, v in get_peft_model_state_dict(net, adapter_name="default").items()}
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(adapter_settings(net), indent=2, sort_keys=True)
        save_file(state, folder / LORA_FILE, metadata={"format": "pt", SETTINGS: settings})

    def load_lora(self, folder: Path) -> None:
        """Put a LoRA written by :meth:`save_lora` on the ControlNet."""
        from safetensors import safe_open

        with reading_lora(folder, LORA_FILE, self.name, self.net) as wanted:
            with safe_open(folder / LORA_FILE, framework="pt") as file:
                wanted += file.keys()
            self.stock_lora(folder, LORA_FILE)

    def stock_lora(self, folder: Path, file: str) -> None:
        """Put a LoRA on the ControlNet with stock code."""
        net: Any = self.net
        net.load_lora_adapter(folder, prefix=None, weight_name=file, adapter_name="default", use_safetensors=True)


class _Unet(Steering):
    """Of both kinds of UNet."""

    kind = "ControlNetModel"
    steers = "unet"
    blocks = ("BasicTransformerBlock",)
    takes = ("down_block_additional_residuals", "mid_block_additional_residual")
    shared = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type")
    refused: ClassVar = {
        "conditioning_channels": (3, "other images than RGB"),
        "global_pool_conditions": (False, "ControlNets that pool their output"),
    }


class Family(_Unet, sd.Family):
    """A ControlNet of SD 1.x and 2.x; a checkpoint of another kind loads as :class:`XL` or :class:`Flux`."""

    pipeline = "StableDiffusionControlNetPipeline"
    base = "StableDiffusionPipeline"


class XL(_Unet, sdxl.Family):
    """A ControlNet of SDXL, which reads the geometry of the picture too."""

    pipeline = "StableDiffusionXLControlNetPipeline"
    base = "StableDiffusionXLPipeline"


class Flux(Steering, flux.Family):
    """A ControlNet of FLUX.1 that reads latents of the image (InstantX, Shakker Labs) or its pixels (XLabs).

    Latents are posterior means here, where the stock pipeline draws from the posterior. With true classifier-free
    guidance the ControlNet reads the prompt in both branches, as it does there.
    """

    pipeline = "FluxControlNetPipeline"
    base = "FluxPipeline"
    kind = "FluxControlNetModel"
    steers = "transformer"
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    takes = ("controlnet_block_samples", "controlnet_single_block_samples")
    shared = (
        "in_channels",
        "joint_attention_dim",
        "pooled_projection_dim",
        "num_attention_heads",
        "attention_head_dim",
    )
    refused: ClassVar = {"num_mode": (None, "union ControlNets, which read a mode with every image")}

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        super().__init__(pipe, source, device)
        self.reads_pixels = pipe.controlnet.input_hint_block is not None
        self.network_options = {"controlnet_blocks_repeat": self.reads_pixels}

    def _digest(self) -> str:
        return f"{super()._digest()}-{'pixels' if self.reads_pixels else 'latents'}"

    @torch.no_grad()
    def encode_condition(self, images: Sequence[Image.Image], size: Size) -> Condition:
        """``control``: the pixels as those of SD, or latents (N, C, h, w) as the transformer sees them."""
        found = super().encode_condition(images, size)["control"]
        if self.reads_pixels:
            return {"control": found}
        return {"control": torch.cat([self.latents(*self.encode_media(_signed(one))) for one in found.split(1)])}

    def condition(self, requests: Sequence[Request], size: Size | None) -> Condition:
        """For sampling: what the ControlNet reads of the prompts, too, as its branch without them has the prompts."""
        cond = super().condition(requests, size)
        return {**cond, **{f"control.{name}": cond[name] for name in ("states", "pooled")}}

    def reads(self, x_t: Tensor, t: Tensor, cond: Condition) -> dict[str, Any]:
        """Packed latents or pixels in [-1, 1], the prompt, and the guidance scale if it is told that."""
        config: Any = self.net.config
        control = cond["control"]
        image = _signed(control) if self.reads_pixels else flux.pack(control)
        return {
            "controlnet_cond": image.to(x_t.dtype),
            "conditioning_scale": self.conditioning_scale,
            "encoder_hidden_states": cond.get("control.states", cond["states"]),
            "pooled_projections": cond.get("control.pooled", cond["pooled"]),
            "guidance": torch.full_like(t, self.guidance) if config.guidance_embeds else None,
        }


def pixels(image: Image.Image, size: Size) -> Tensor:
    """(3, H, W) in uint8, resized as the stock image processor does by default."""
    resized = image.resize((size[1], size[0]), Image.Resampling.LANCZOS).convert("RGB")
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _signed(image: Tensor) -> Tensor:
    """Pixels of uint8 -> [-1, 1]."""
    return 2 * (image.float() / 255) - 1
