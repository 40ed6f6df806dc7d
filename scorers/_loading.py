"""What the learned scorers share: where they run, their files, and pictures that cannot be scored."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.foreign import quiet
from diffalign.scoring import Failure, Outcome, Sample, Score

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 3  # keys that an error lists
MAX_RATIO = 200  # a longer picture would fill the memory when its short side grows to what the network reads


class Place(NamedTuple):
    """Where a network runs and in what."""

    device: torch.device
    dtype: torch.dtype


def place(device: str, dtype: str, batch: int) -> Place:
    """The device and the dtype of the parameters that all learned scorers have.

    Args:
        device: ``auto`` (this process's GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` ...
        dtype: ``fp32``, ``bf16`` or ``fp16``; what the network leaves is made unit length and compared in fp32.
        batch: pictures, or prompts, per forward pass.
    """
    check_choice("dtype", dtype, get_args(Precision))
    if type(batch) is not int or batch < 1:
        raise UserError(f"batch {batch!r}: expected a positive integer")
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:  # one spelling, since loaded networks are shared by device
            where = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device {device!r}: {str(error).partition(chr(10))[0]}") from None
    return Place(where, DTYPES[dtype])


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in (names := tuple(choices)):
        raise UserError(f"{name} {value!r}: choose {', '.join(names)}")


def extra(package: str) -> Any:
    """Import a package that the base install does not have."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f"no module {error.name!r}: pip install 'diffalign[scorers]'") from None
    except Exception as error:  # a torchvision built for another torch: `RuntimeError: operator ... does not exist`
        reason = " ".join(str(error).split())
        raise UserError(f"{package} cannot be imported ({reason}); `diffalign doctor` checks the versions") from None


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever a library raises about files or Hub ids into one line."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def find_weights(weights: str, name: str) -> Path:
    """A file, the file ``name`` of a folder, or that file of a Hub repository ``owner/repo``."""
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / name).is_file():
            return path / name
        raise UserError(f"{path} holds no {name}")
    if weights.count("/") != 1 or weights.startswith((".", "/", "~")) or path.suffix in (".pt", ".pth", ".safetensors"):
        raise UserError(f"{path}: no such file")
    from huggingface_hub import hf_hub_download

    with loading(f"{weights}/{name}"):
        return Path(hf_hub_download(weights, name))


def read_tensors(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """A state dict from safetensors or a torch file, never by unpickling objects.

    Args:
        inside: key that a torch file may keep the state dict under.

    Raises:
        UserError: the file cannot be read, or holds more than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"{path}: no file of plain tensors ({kind}); objects and scripts are not unpickled") from None
    if inside is not None and isinstance(state, Mapping) and isinstance(state.get(inside), Mapping):
        state = state[inside]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict of named tensors")
    return dict(state)


def fill(net: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load a state dict, all of it and nothing else.

    Raises:
        UserError: keys are missing or left over, or shapes differ; the first of them are named.
    """
    own = net.state_dict()
    both = [key for key in own if key in state]
    wrong = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
            for key in both
            if state[key].shape != own[key].shape
        ],
    }
    refuse_misfit(wrong, source)
    net.load_state_dict(state)


def refuse_misfit(wrong: Mapping[str, Sequence[str]], source: object) -> None:
    """One line on what does not fit, by kind of misfit, unless everything does."""
    parts = [
        f"{what}: {', '.join(keys[:SHOWN])}" + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
        for what, keys in wrong.items()
        if keys
    ]
    if parts:
        raise UserError(f"{source} does not fit the network; {'; '.join(parts)}")


def score_pictures(
    samples: Sequence[Sample], score: Callable[[Sequence[Sample]], Iterable[Score]], batch: int | None = None
) -> list[Outcome]:
    """Score the samples that have a usable picture, ``batch`` at a time; each of the others is a failure of its own."""
    outcomes: list[Outcome | None] = [_unusable(sample.image) for sample in samples]
    good = [sample for sample, failure in zip(samples, outcomes, strict=True) if failure is None]
    scores = (one for some in cuts(good, batch or len(good) or 1) for one in score(some))
    return [next(scores) if failure is None else failure for failure in outcomes]


def _unusable(image: Image.Image | None) -> Failure | None:
    if image is None:
        return Failure("input", "no picture")
    short, long = sorted(image.size)
    if short == 0 or long > MAX_RATIO * short:
        return Failure("input", f"a picture of {image.size[0]}x{image.size[1]} pixels")
    return None


def cuts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of up to ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
