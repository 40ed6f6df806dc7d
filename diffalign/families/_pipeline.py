"""Families that are diffusers pipelines: loading, the VAE, LoRA files."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import UserError, nearest
from diffalign.families.base import LatentFamily
from diffalign.foreign import LORA_FILE, adapter_settings, foreign_files, quiet, reading_lora
from diffalign.media import Size
from diffalign.networks import Loading


def _read_index(path: str, pipeline: Any, skipped: Iterable[str]) -> tuple[str | None, dict[str, Any]]:
    """The pipeline of a diffusers folder or Hub id, and the library of each component that will be loaded.

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
    return listed.get("_class_name"), libraries


def _is_known(library: Any) -> bool:
    if library in ("diffusers", "transformers"):
        return True
    is_name = isinstance(library, str) and library.isidentifier()
    return is_name and importlib.util.find_spec(f"diffusers.pipelines.{library}") is not None


class DiffusersFamily(LatentFamily):
    """A diffusers pipeline taken apart: frozen encoders and VAE, one trainable ``net``, one schedule.

    Subclasses name the pipeline and write ``_encode`` and ``predict``.
    """

    pipeline: ClassVar[str]
    without: ClassVar[tuple[str, ...]] = ()
    """Components that a checkpoint may leave out; the stock loader insists on being told."""
    options: ClassVar[dict[str, Any]] = {}
    """More for the stock loader; components that are None here are never loaded, whether the folder has them or not."""

    def __init__(self, pipe: Any, source: str, device: torch.device) -> None:
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        super().__init__(parts, source, device)
        self.pipe = pipe
        self.vae: Any = pipe.vae

    @classmethod
    def pipeline_class(cls) -> Any:
        """The stock pipeline class, imported on first use."""
        import diffusers

        return getattr(diffusers, cls.pipeline)

    @classmethod
    def variant(cls, pipeline: str | None) -> type[DiffusersFamily]:
        """The class for a checkpoint of that stock pipeline: this one, unless a model line has several pipelines."""
        return cls

    @classmethod
    def load(cls, path: str, device: torch.device, loading: Loading = Loading()) -> DiffusersFamily:  # noqa: B008
        """Load from a diffusers folder or Hub id, safetensors only."""
        pipeline, libraries = _read_index(path, cls.pipeline_class(), {**cls.options, **loading.parts})
        cls = cls.variant(pipeline)
        absent = dict.fromkeys(name for name in cls.without if libraries.get(name) is None)
        needed = inspect.signature(cls.pipeline_class()).parameters.values()
        needed = {p.name for p in needed if p.default is p.empty} - set(cls.without) - set(cls.options)
        lacking = sorted(name for name in needed - set(loading.parts) if libraries.get(name) is None)
        if lacking:
            what = f"{path} comes without {', '.join(lacking)}, and {cls.name} needs it"
            raise UserError(f"model.path: {what}; model.parts can name another place for a component")
        quant = loading.quantisation("diffusers")
        with foreign_files(f"model.path: cannot load {path} as {cls.pipeline}"), quiet():
            parts = {name: cls._part(name, path, place, loading) for name, place in loading.parts.items()}
            if quant is not None:
                from diffusers import PipelineQuantizationConfig

                parts["quantization_config"] = PipelineQuantizationConfig(quant_mapping={cls.net_name: quant})
            pipe = cls.pipeline_class().from_pretrained(
                path,
                dtype={"default": loading.torch_dtype, "vae": torch.float32},
                use_safetensors=True,
                **absent,
                **{**cls.options, **parts},
            )
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        broken = [name for name, part in modules.items() if any(p.is_meta for p in part.parameters())]
        broken += [name for name in ("vae", cls.net_name) if name not in modules]
        if broken:
            raise UserError(f"model.path: {path} lacks weights of its {', '.join(broken)}; get the folder again")
        family = cls(pipe, path, device)
        family.dtype = loading.torch_dtype
        return family

    @classmethod
    def _part(cls, name: str, path: str, place: str, loading: Loading) -> Any:
        """A component from a folder or Hub id of its own, or from the whole pipeline that is there.

        Raises:
            UserError: the pipeline has no component of that name.
        """
        kind: Any = cls.part_class(name, path)
        inner = {"subfolder": name} if (Path(place) / "model_index.json").is_file() else {}
        dtype = torch.float32 if name == "vae" else loading.torch_dtype
        is_network = issubclass(kind, nn.Module)
        options = {"dtype": dtype, "use_safetensors": True} if is_network else {}
        return kind.from_pretrained(place, **inner, **options)

    @classmethod
    def part_class(cls, name: str, path: str) -> Any:
        """The class of a component, as the index of the pipeline names it."""
        listed = cls.pipeline_class().load_config(path).get(name)
        library, kind = listed if isinstance(listed, list | tuple) else (None, None)
        if library not in ("diffusers", "transformers"):
            raise UserError(f"model.parts: {path} has no component {name!r}{nearest(name, cls._components())}")
        return getattr(importlib.import_module(library), str(kind))

    @classmethod
    def _components(cls) -> list[str]:
        return [name for name in inspect.signature(cls.pipeline_class()).parameters if name not in cls.options]

    # --- images -------------------------------------------------------------------------------------------------

    @property
    def default_size(self) -> Size:
        """Height and width in pixels the model was made for."""
        side = self.networks[-1].config.sample_size * self.pipe.vae_scale_factor  # type: ignore[union-attr]
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

    @torch.no_grad()
    def encode_media(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, H, W) or clips (N, 3, F, H, W) in [-1, 1] -> mean and log-variance of the VAE posterior."""
        posterior = self.vae.encode(samples.to(self.device)).latent_dist
        return posterior.mean, posterior.logvar

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Network-space latents from a posterior; without noise its mean."""
        return self.to_network(mean if noise is None else mean + (0.5 * logvar).exp() * noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Network-space latents -> images (N, 3, H, W) or clips (N, 3, F, H, W) in [0, 1]."""
        return (self.vae.decode(self.to_vae(latents), return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def to_network(self, z: Tensor) -> Tensor:
        """Latents as the network sees them from latents of the VAE, (..., C, h, w), of clips (..., C, f, h, w)."""
        shift, std, factor = self._statistics(z)
        return (z - shift) / std * factor

    def to_vae(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`to_network`."""
        shift, std, factor = self._statistics(latents)
        return latents / factor * std + shift

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float, float]:
        """Mean and deviation of the VAE's latents and a factor; per channel, (C, 1, 1), where its config lists them."""
        config = self.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        per_channel = (-1, 1, 1, 1) if self.modality == "video" else (-1, 1, 1)
        shift = config.get("shift_factor") or 0.0 if mean is None else like.new_tensor(mean).view(per_channel)
        deviation = 1.0 if std is None else like.new_tensor(std).view(per_channel)
        return shift, deviation, config.get("scaling_factor", 1.0)

    # --- adapters -----------------------------------------------------------------------------------------------

    def save_lora(self, folder: Path, net: nn.Module) -> None:
        """Write ``pytorch_lora_weights.safetensors``, which stock ``pipe.load_lora_weights(folder)`` reads."""
        from peft import get_peft_model_state_dict

        layers = {f"{self.net_name}_lora_layers": get_peft_model_state_dict(net, adapter_name="default")}
        metadata = {f"{self.net_name}_lora_adapter_metadata": adapter_settings(net)}
        self.pipeline_class().save_lora_weights(folder, safe_serialization=True, **layers, **metadata)

    def save_net(self, folder: Path, net: nn.Module) -> None:
        """Write full weights as diffusers reads them: ``config.json`` and safetensors."""
        net.save_pretrained(folder)  # type: ignore[operator]

    def stock_lora(self, folder: Path, file: str) -> None:
        """Put a LoRA on the network as users of the stock pipeline do."""
        self.pipe.load_lora_weights(folder, weight_name=file)

    def load_lora(self, folder: Path) -> None:
        """Put a LoRA written by :meth:`save_lora` (or any diffusers LoRA of this family) on the network."""
        with reading_lora(folder, LORA_FILE, self.name, self.net) as wanted:
            state, *alphas, metadata = self.pipeline_class().lora_state_dict(
                folder, weight_name=LORA_FILE, use_safetensors=True, return_lora_metadata=True
            )
            mine = [key for key in state if key.startswith(f"{self.net_name}.")]
            if not mine:
                raise UserError(f"model.adapter: {folder} holds no weights for the {self.net_name} of a {self.name}")
            wanted += [key for key in mine if "lora_" in key]
            self.net.load_lora_adapter(  # type: ignore[operator]
                state,
                prefix=self.net_name,
                adapter_name="default",
                metadata=metadata,
                network_alphas=alphas[0] if alphas else None,
            )
