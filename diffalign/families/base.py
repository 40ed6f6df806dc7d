"""What the diffusers families share: loading, the VAE, prompt encoding without gradient. The only base class."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError, nearest
from diffalign.media import Modality, Size, View
from diffalign.types import Condition, Request, Schedule

LORA_FILE = "pytorch_lora_weights.safetensors"
WORLDS = Path(__file__).parent.parent / "worlds"
EMBEDDED = {world: WORLDS / world / "weights" for world in ("shapes", "puzzles")}


def family_names() -> list[str]:
    """Every family that can be loaded: the files of this package."""
    package = importlib.import_module("diffalign.families")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")


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


def load_family(name: str, path: str, device: str = "auto", adapter: str | None = None) -> Any:
    """Load a model line from a diffusers or transformers folder, a Hub id, or ``embedded:<world>``.

    Args:
        name: family name.
        adapter: a LoRA folder to merge into the network (generation and evaluation).

    Raises:
        UserError: unknown family, missing or unreadable weights.
    """
    kind = family_class(name)
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
def quiet() -> Iterator[None]:
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


@contextmanager
def foreign_files(failure: str) -> Iterator[None]:
    """Turns whatever a library raises about files it cannot use into one line of bad input."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{failure}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _read_index(path: str, pipeline: Any, skipped: Iterable[str]) -> dict[str, Any]:
    """The components of a diffusers folder or Hub id and the library of each, but for those that will not be loaded.

    Raises:
        UserError: it is missing or broken, a component is missing, or one is code that comes with the files.
    """
    folder = Path(path) if Path(path).exists() or path.startswith((".", "/")) else None
    if folder is not None and not (folder / "model_index.json").is_file():
        raise UserError(f"model.path: {folder} holds no model_index.json; give a diffusers folder or a Hub id")
    index = f"{path}/model_index.json"
    try:
        with foreign_files(f"model.path: cannot load {path} from the Hub"):
            listed = pipeline.load_config(path) if folder is None else None
        listed = listed or json.loads(Path(index).read_bytes())
        parts = listed.keys() - set(skipped)
        libraries = {name: listed[name][0] for name in sorted(parts) if isinstance(listed[name], list | tuple)}
    except (ValueError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"model.path: {index} is not a list of components ({error}); get the folder again") from None
    for name, library in libraries.items():
        if library is not None and not _is_known(library):
            raise UserError(f"model.path: {index}: {name} is code from {library!r}; only diffusers' own parts are run")
        if library is not None and folder is not None and not (folder / name).is_dir():
            raise UserError(f"model.path: {folder} holds no {name}, which its model_index.json lists")
    return libraries


def _is_known(library: Any) -> bool:
    if library in ("diffusers", "transformers"):
        return True
    is_name = isinstance(library, str) and library.isidentifier()
    return is_name and importlib.util.find_spec(f"diffusers.pipelines.{library}") is not None


def tensor_digest(named: Iterable[tuple[str, Tensor]], note: str = "") -> str:
    """SHA-256 of a note and of tensors with their names, in the order given."""
    digest = hashlib.sha256(note.encode())
    for name, value in named:
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class DiffusersFamily:
    """A diffusers pipeline taken apart: frozen encoders and VAE, one trainable ``net``, one schedule.

    Subclasses name the pipeline and write ``encode_prompt`` and ``predict``.
    """

    name: str
    modality: Modality = "image"
    net_name: ClassVar[str] = "transformer"
    lora_file: ClassVar[str] = LORA_FILE
    index_file: ClassVar[str] = "model_index.json"
    pipeline: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    without: ClassVar[tuple[str, ...]] = ()
    """Components that a checkpoint may leave out; the stock loader insists on being told."""
    reads_condition: ClassVar[bool] = False
    """Whether every sample needs a condition image beside its prompt."""
    options: ClassVar[dict[str, Any]] = {}
    """More for the stock loader; components that are None here are never loaded, whether the folder has them or not."""

    schedule: Schedule

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        self.pipe = pipe
        self.source = source
        self.device = device
        self.net: nn.Module = getattr(pipe, self.net_name)
        self.vae: Any = pipe.vae
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval().to(device)
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
        libraries = _read_index(path, cls.pipeline_class(), cls.options)
        absent = dict.fromkeys(name for name in cls.without if libraries.get(name) is None)
        needed = inspect.signature(cls.pipeline_class()).parameters.values()
        needed = {p.name for p in needed if p.default is p.empty} - set(cls.without) - set(cls.options)
        lacking = [name for name, library in libraries.items() if library is None and name in needed]
        if lacking:
            raise UserError(f"model.path: {path} comes without {', '.join(lacking)}, and {cls.name} needs it")
        with foreign_files(f"model.path: cannot load {path} as {cls.pipeline}"), quiet():
            pipe = cls.pipeline_class().from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, **absent, **cls.options
            )
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        broken = [name for name, part in parts.items() if any(p.is_meta for p in part.parameters())]
        broken += [name for name in ("vae", cls.net_name) if name not in parts]
        if broken:
            raise UserError(f"model.path: {path} lacks weights of its {', '.join(broken)}; get the folder again")
        return cls(pipe, path, device)

    # --- images -------------------------------------------------------------------------------------------------

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels the model was made for."""
        side = self.net.config.sample_size * self.pipe.vae_scale_factor  # type: ignore[union-attr]
        return side, side

    @property
    def size_rule(self) -> tuple[int, int | None]:
        """What the sides of an image must be multiples of, and their maximum, if there is one."""
        return self.pipe.vae_scale_factor, None

    def sample_size(self, size: Size | None) -> Size:
        """Height and width in pixels that will be used for a wish.

        Raises:
            UserError: a size the model cannot represent.
        """
        if size is not None and len(size) != 2:
            raise UserError(f"size {list(size)}: {self.name} makes images, give height and width")
        height, width = size or self.default_size
        step, most = self.size_rule
        if any(side <= 0 or side % step or side > (most or side) for side in (height, width)):
            limit = f" up to {most}" if most else ""
            raise UserError(f"size {height}x{width}: both sides must be multiples of {step}{limit}")
        return height, width

    def latent_shape(self, size: Size | None) -> tuple[int, ...]:
        """(C, h, w) of a latent for an image of ``size`` pixels."""
        height, width = self.sample_size(size)
        factor = self.pipe.vae_scale_factor
        return self.vae.config.latent_channels, height // factor, width // factor

    def schedule_for(self, size: Size | None) -> Schedule:
        """The schedule to sample an image of ``size`` pixels with; most models have one for all sizes."""
        return self.schedule

    @property
    def fingerprint(self) -> str:
        """A digest of the frozen encoders: two models with equal fingerprints encode alike."""
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        parts = {n: p for n, p in self.pipe.components.items() if isinstance(p, nn.Module) and p is not self.net}
        frozen = ((f"{n}.{key}", value) for n in sorted(parts) for key, value in sorted(parts[n].state_dict().items()))
        return tensor_digest(frozen)[:16]

    @torch.no_grad()
    def encode_media(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, H, W) in [-1, 1] -> mean and log-variance of the VAE posterior, unscaled."""
        posterior = self.vae.encode(samples.to(self.device)).latent_dist
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

    def encode_condition(self, images: Sequence[Image.Image], size: Size) -> Condition:
        """What condition images give, leading with N, for samples of ``size``."""
        raise NotImplementedError

    def encode_geometry(self, views: Sequence[View]) -> Condition:
        """What the network is told of how pictures were cut, leading with N; most are told nothing."""
        return {}

    def condition(self, requests: Sequence[Request], size: Size | None) -> Condition:
        """Everything that samples of ``size`` are conditioned on, leading with N; pictures are not cropped."""
        resolved = self.sample_size(size)
        height, width = resolved[-2:]
        cond = self.encode_prompt([str(request.prompt) for request in requests])
        cond |= self.encode_geometry([View((height, width), (height, width), (0, 0), (height, width))] * len(requests))
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

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's output at unit time ``t`` (N,), in the schedule's parametrisation."""
        raise NotImplementedError

    # --- adapters -----------------------------------------------------------------------------------------------

    def save_lora(self, folder: Path, net: nn.Module) -> None:
        """Write ``pytorch_lora_weights.safetensors``, which stock ``pipe.load_lora_weights(folder)`` reads."""
        from peft import get_peft_model_state_dict

        settings = net.peft_config["default"].to_dict()  # type: ignore[index]
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        layers = {f"{self.net_name}_lora_layers": get_peft_model_state_dict(net, adapter_name="default")}
        metadata = {f"{self.net_name}_lora_adapter_metadata": plain}  # sets have no order, files should
        self.pipeline_class().save_lora_weights(folder, safe_serialization=True, **layers, **metadata)

    def save_net(self, folder: Path, net: nn.Module) -> None:
        """Write full weights as diffusers reads them: ``config.json`` and safetensors."""
        net.save_pretrained(folder)  # type: ignore[operator]

    def load_lora(self, folder: Path) -> None:
        """Put a LoRA written by :meth:`save_lora` (or any diffusers LoRA of this family) on the network."""
        if not (folder / LORA_FILE).is_file():
            raise UserError(f"model.adapter: {folder} holds no {LORA_FILE}")
        with foreign_files(f"model.adapter: {folder} does not fit this {self.name}"):
            state, *alphas, metadata = self.pipeline_class().lora_state_dict(
                folder, weight_name=LORA_FILE, use_safetensors=True, return_lora_metadata=True
            )
            mine = [key for key in state if key.startswith(f"{self.net_name}.")]
            if not mine:
                raise UserError(f"model.adapter: {folder} holds no weights for the {self.net_name} of a {self.name}")
            self.net.load_lora_adapter(  # type: ignore[operator]
                state, prefix=self.net_name, metadata=metadata, network_alphas=alphas[0] if alphas else None
            )
        loaded = sum("lora_" in name for name, _ in self.net.named_parameters())
        if loaded < sum("lora_" in key for key in mine):
            raise UserError(f"model.adapter: {folder}: only {loaded} of {len(mine)} tensors fit this {self.name}")
