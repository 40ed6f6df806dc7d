"""What the diffusers families share: loading, the VAE, prompt encoding without gradient. The only base class."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffalign.errors import UserError, nearest
from diffalign.types import Condition, Schedule

EMBEDDED = {"shapes": Path(__file__).parent.parent / "worlds" / "shapes" / "weights"}


def family_names() -> list[str]:
    """Every family that can be loaded: the files of this package."""
    package = importlib.import_module("diffalign.families")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU.

    Raises:
        UserError: a device this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is not a torch device (auto, cpu, cuda, cuda:1)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device: {name!r} asked for, but torch sees no CUDA device; use cpu or auto")
    return device


def load_family(name: str, path: str, device: str = "auto", adapter: str | None = None) -> DiffusersFamily:
    """Load a model line from a diffusers folder, a Hub id, or ``embedded:<world>``.

    Args:
        name: family name.
        adapter: a LoRA folder to merge into the network (generation and evaluation).

    Raises:
        UserError: unknown family, missing or unreadable weights.
    """
    if name not in family_names():
        raise UserError(f"unknown family {name!r}{nearest(name, family_names())}")
    kind: type[DiffusersFamily] = importlib.import_module(f"diffalign.families.{name}").Family
    if path.startswith("embedded:"):
        world = path.removeprefix("embedded:")
        if world not in EMBEDDED:
            raise UserError(f"no embedded model {world!r}{nearest(world, EMBEDDED)}")
        path = str(EMBEDDED[world])
    family = kind.load(path, pick_device(device))
    if adapter is not None:
        family.load_lora(Path(adapter))
    return family


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own progress bars, which would interleave with ours."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    bars = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in bars:
            log.enable_progress_bar()


class DiffusersFamily:
    """A diffusers pipeline taken apart: frozen encoders and VAE, one trainable ``net``, one schedule.

    Subclasses name the pipeline and write ``encode_prompt`` and ``predict``.
    """

    name: str
    modality: Literal["image", "video"] = "image"
    net_name: ClassVar[str] = "transformer"
    pipeline: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    without: ClassVar[tuple[str, ...]] = ()
    """Components that a checkpoint may leave out; the stock loader insists on being told."""

    schedule: Schedule

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        self.pipe = pipe
        self.source = source
        self.device = device
        self.net: nn.Module = getattr(pipe, self.net_name)
        self.vae: Any = pipe.vae
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval().to(device, torch.float32)
        self._conditions: dict[str, Condition] = {}
        self._fingerprint: str | None = None

    @classmethod
    def pipeline_class(cls) -> Any:
        """The stock pipeline class, imported on first use."""
        import diffusers

        return getattr(diffusers, cls.pipeline)

    @classmethod
    def load(cls, path: str, device: torch.device) -> DiffusersFamily:
        """Load from a diffusers folder or Hub id, safetensors only; everything becomes float32."""
        absent = dict.fromkeys(cls.without)
        index = Path(path) / "model_index.json"
        if Path(path).exists() or path.startswith((".", "/")):
            if not index.is_file():
                raise UserError(f"model.path: {path} holds no model_index.json; give a diffusers folder or a Hub id")
            listed = json.loads(index.read_text(encoding="utf-8"))
            absent = dict.fromkeys(name for name in cls.without if listed.get(name, [None])[0] is None)
        try:
            with _quiet():
                pipe = cls.pipeline_class().from_pretrained(path, use_safetensors=True, **absent)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model.path: cannot load {path} as {cls.pipeline}: {reason}") from None
        return cls(pipe, path, device)

    # --- images -------------------------------------------------------------------------------------------------

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels the model was made for."""
        side = self.net.config.sample_size * self.pipe.vae_scale_factor  # type: ignore[union-attr]
        return side, side

    def image_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Height and width in pixels that will be used for a wish.

        Raises:
            UserError: a size the VAE cannot represent.
        """
        height, width = size or self.default_size
        factor = self.pipe.vae_scale_factor
        if height % factor or width % factor:
            raise UserError(f"size {height}x{width}: both sides must be multiples of {factor}")
        return height, width

    def latent_shape(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        """(C, h, w) of a latent for an image of ``size`` pixels."""
        height, width = self.image_size(size)
        factor = self.pipe.vae_scale_factor
        return self.vae.config.latent_channels, height // factor, width // factor

    @property
    def fingerprint(self) -> str:
        """A digest of the frozen encoders: two models with equal fingerprints encode alike."""
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, part in sorted(self.pipe.components.items()):
            if isinstance(part, nn.Module) and part is not self.net:
                for key, value in sorted(part.state_dict().items()):
                    digest.update(f"{name}.{key}".encode())
                    digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] -> mean and log-variance of the VAE posterior, unscaled."""
        posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        return posterior.mean, posterior.logvar

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Network-space latents from a posterior; without noise its mean."""
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Network-space latents -> images (N, 3, H, W) in [0, 1]."""
        z = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    # --- text ---------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        """Condition tensors leading with N = len(prompts); every distinct prompt is encoded once and kept."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._conditions]
        for start in range(0, len(missing), 256):
            chunk = missing[start : start + 256]
            with torch.no_grad():
                encoded = self._encode(chunk)
            for row, prompt in enumerate(chunk):
                self._conditions[prompt] = {name: value[row].cpu() for name, value in encoded.items()}
        rows = [self._conditions[p] for p in prompts]
        return {name: torch.stack([r[name] for r in rows]).to(self.device) for name in rows[0]}

    def _encode(self, prompts: list[str]) -> Condition:
        raise NotImplementedError

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's output at unit time ``t`` (N,), in the schedule's parametrisation."""
        raise NotImplementedError

    # --- adapters -----------------------------------------------------------------------------------------------

    def save_lora(self, folder: Path, net: nn.Module) -> None:
        """Write ``pytorch_lora_weights.safetensors``, which stock ``pipe.load_lora_weights(folder)`` reads."""
        from peft import get_peft_model_state_dict

        layers = {f"{self.net_name}_lora_layers": get_peft_model_state_dict(net, adapter_name="default")}
        metadata = {f"{self.net_name}_lora_adapter_metadata": net.peft_config["default"].to_dict()}  # type: ignore[index]
        self.pipeline_class().save_lora_weights(folder, safe_serialization=True, **layers, **metadata)

    def save_net(self, folder: Path, net: nn.Module) -> None:
        """Write full weights as diffusers reads them: ``config.json`` and safetensors."""
        net.save_pretrained(folder)  # type: ignore[operator]

    def load_lora(self, folder: Path) -> None:
        """Put a LoRA written by :meth:`save_lora` (or any diffusers LoRA of this family) on the network."""
        if not (folder / "pytorch_lora_weights.safetensors").is_file():
            raise UserError(f"model.adapter: {folder} holds no pytorch_lora_weights.safetensors")
        self.pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
