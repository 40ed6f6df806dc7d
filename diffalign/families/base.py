"""What families share: how they are found and loaded, frozen parts, conditions encoded once."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError, nearest
from diffalign.foreign import LORA_FILE, tensor_digest
from diffalign.media import Modality, Size, View
from diffalign.networks import Loading
from diffalign.types import Condition, Request, Schedule, joined

WORLDS = Path(__file__).parent.parent / "worlds"
EMBEDDED = {world: WORLDS / world / "weights" for world in ("shapes", "puzzles")}


def family_names() -> list[str]:
    """Every family that can be loaded: the files of this package, without the parts of others (``_*``)."""
    package = importlib.import_module("diffalign.families")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base" and m.name[0] != "_")


def pick_device(name: str) -> torch.device:
    """``auto`` is this process's CUDA device (LOCAL_RANK, set by `accelerate launch`), else the CPU.

    Raises:
        UserError: a device this machine does not have.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is not a torch device (auto, cpu, cuda, cuda:1)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device: {name!r} asked for, but torch sees no CUDA device; use cpu or auto")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise UserError(f"model.device: {name!r} cannot be used: {str(error).partition('. ')[0]}") from None
    return device


def family_class(name: str) -> Any:
    """The class of a family; nothing is loaded.

    Raises:
        UserError: unknown family.
    """
    if name not in family_names():
        raise UserError(f"unknown family {name!r}{nearest(name, family_names())}")
    return importlib.import_module(f"diffalign.families.{name}").Family


def load_family(
    name: str,
    path: str,
    device: str = "auto",
    adapter: str | None = None,
    loading: Loading = Loading(),  # noqa: B008
) -> Any:
    """Load a model line from a diffusers or transformers folder, a Hub id, or ``embedded:<world>``.

    Args:
        name: family name.
        adapter: a LoRA folder to put on the network (generation and evaluation).
        loading: precision, quantisation, and components from elsewhere.

    Raises:
        UserError: unknown family, missing or unreadable weights.
    """
    kind = family_class(name)
    if path.startswith("embedded:"):
        world = path.removeprefix("embedded:")
        if world not in EMBEDDED:
            raise UserError(f"no embedded model {world!r}{nearest(world, EMBEDDED)}")
        path = str(EMBEDDED[world])
    family = kind.load(path, pick_device(device), loading)
    if adapter is not None:
        family.load_lora(Path(adapter))
    return family


class LatentFamily:
    """What every family with a latent space shares, whatever its files: frozen parts and conditions encoded once.

    Subclasses load the parts and write ``_encode`` and ``predict``.
    """

    name: str
    modality: Modality = "image"
    reads_condition: bool = False
    """Whether every sample needs a condition image beside its prompt."""
    aligned_condition: bool = False
    """Whether a condition image lies on its sample, point by point, and is cut with it for training."""
    net_name: ClassVar[str] = "transformer"
    lora_file: ClassVar[str] = LORA_FILE
    index_file: ClassVar[str] = "model_index.json"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times at which classifier-free guidance acts, in sampling and in training alike."""
    blocks: ClassVar[tuple[str, ...]] = ()
    """Classes of the repeated blocks, where the network does not name them itself."""
    dtype: torch.dtype = torch.float32
    """Of what does not train."""
    schedule: Schedule

    def __init__(self, parts: Mapping[str, nn.Module], source: str, device: torch.device) -> None:
        """``parts``: every network by name, the one that trains under ``net_name``."""
        self.source = source
        self.device = device
        self.net: nn.Module = parts[self.net_name]
        self._parts = dict(parts)
        for part in parts.values():
            part.requires_grad_(False).eval().to(device)
        self._conditions: dict[str, Condition] = {}
        self._released = False
        self._fingerprint: str | None = None

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """What a prediction runs; the last one makes it, and only ``net`` trains."""
        return (self.net,)

    def schedule_for(self, size: Size | None) -> Schedule:
        """The schedule to sample a sample of ``size`` with; most models have one for all sizes."""
        return self.schedule

    @property
    def fingerprint(self) -> str:
        """A digest of the frozen encoders: two models with equal fingerprints encode alike."""
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        parts = {name: part for name, part in self._parts.items() if all(part is not net for net in self.networks)}
        frozen = ((f"{n}.{key}", value) for n in sorted(parts) for key, value in sorted(parts[n].state_dict().items()))
        return tensor_digest(frozen)[:16]

    def release(self) -> None:
        """Give back the memory of what a prediction does not run, when everything is encoded."""
        kept = {id(module) for net in self.networks for module in net.modules()}
        for part in self._parts.values():
            if not any(id(module) in kept for module in part.modules()):
                part.to("meta")
        self._conditions.clear()
        self._released = True

    @property
    def default_size(self) -> Size:
        """Size of a sample the model was made for."""
        raise NotImplementedError

    def sample_size(self, size: Size | None) -> Size:
        """The size that will be used for a wish.

        Raises:
            UserError: a size the model cannot represent.
        """
        raise NotImplementedError

    def latent_shape(self, size: Size | None) -> tuple[int, ...]:
        """Shape of the latent of one sample."""
        raise NotImplementedError

    def encode_media(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Samples (N, ...) -> mean and log-variance of the VAE posterior, unscaled."""
        raise NotImplementedError

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Network-space latents from a posterior; without noise its mean."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Network-space latents -> samples as :mod:`diffalign.media` writes them."""
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager:
        """What a network whose weights are not held in float32 runs in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def encode_prompt(self, prompts: Sequence[str]) -> Condition:
        """Condition tensors leading with N = len(prompts); every distinct prompt is encoded once and kept.

        Raises:
            UserError: the text encoders were given back; guidance needs them for the empty prompt.
        """
        missing = [p for p in dict.fromkeys(prompts) if p not in self._conditions]
        if missing and self._released:
            raise UserError(
                f"{self.name} has given back its text encoders, so {missing[0]!r} cannot be encoded any more; "
                "guidance in training (estimate.guidance) needs them for the empty prompt"
            )
        for start in range(0, len(missing), 256):
            chunk = missing[start : start + 256]
            with torch.no_grad():
                encoded = self._encode(chunk)
            for row, prompt in enumerate(chunk):
                self._conditions[prompt] = {name: value[row].cpu() for name, value in encoded.items()}
        rows = [{name: value[None] for name, value in self._conditions[p].items()} for p in prompts]
        return {name: value.to(self.device) for name, value in joined(rows).items()}

    def _encode(self, prompts: list[str]) -> Condition:
        raise NotImplementedError

    def encode_condition(self, images: Sequence[Image.Image], size: Size) -> Condition:
        """What condition images give, leading with N, for samples of ``size``."""
        raise NotImplementedError

    def encode_geometry(self, views: Iterable[View]) -> Condition:
        """What the network is told of how pictures were cut, leading with N; most are told nothing."""
        return {}

    def condition(self, requests: Sequence[Request], size: Size | None) -> Condition:
        """Everything that samples of ``size`` are conditioned on, leading with N; pictures are not cropped."""
        resolved = self.sample_size(size)
        side = (resolved[-2], resolved[-1])
        cond = self.encode_prompt([str(request.prompt) for request in requests])
        cond |= self.encode_geometry([View(side, side, (0, 0), side)] * len(requests))
        if self.reads_condition:
            images = [request.condition for request in requests]
            if any(image is None for image in images):
                raise UserError(f"{self.name} needs a condition image with every prompt, see `condition` of a record")
            cond |= self.encode_condition([image for image in images if image is not None], resolved)
        return cond

    def unconditional(self, cond: Condition) -> Condition:
        """The branch of classifier-free guidance without the prompt; what else the condition holds is kept."""
        n = len(next(iter(cond.values())))
        return {**cond, **self.encode_prompt([""] * n)}

    @torch.no_grad()
    def blank_condition(self) -> Condition:
        """A condition of one sample, for its shapes: networks on the meta device give it without any values.

        A family whose encoding looks at values says the shapes here.
        """
        side = (self.default_size[-2], self.default_size[-1])
        whole = View(side, side, (0, 0), side)
        return {**self._encode([""]), **self.encode_geometry([whole])}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's output at unit time ``t`` (N,), in the schedule's parametrisation."""
        raise NotImplementedError

    def rescale(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        """What sampling makes of a guided prediction (N, ...), given the one with the prompt; most leave it."""
        return guided
