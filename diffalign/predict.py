"""What a training run will take, before anything is loaded: parameters, FLOPs, memory and hours.

The networks are built on the meta device from their configs: they have shapes and no memory. One forward of one sample
is counted there, with the LoRA on it; the rest is arithmetic, stated in every line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from diffalign import draws
from diffalign import records as store
from diffalign.config import ModelConfig, OptimConfig, TrainConfig
from diffalign.errors import UserError
from diffalign.families import base
from diffalign.foreign import foreign_files, quiet
from diffalign.likelihood import token_log_probs
from diffalign.methods import needs
from diffalign.networks import checkpoint
from diffalign.records import Record, plain
from diffalign.train.optim import make_optimizer
from diffalign.types import Method
from diffalign.weights import add_lora

GIB = 2**30
FLOAT = 4  # bytes; what trains, its gradients and moments are float32 in every precision
FROZEN = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "nf4": 0.5, "int8": 1.0}
"""Bytes of a frozen weight of the network."""
UTILISATION = 0.4
PEAKS = {"A100": (312.0, 19.5), "H100 or H200": (989.0, 67.0), "RTX 4090": (165.0, 82.6), "L40S": (362.0, 91.6)}
"""TFLOP/s as the manufacturer states them: bf16, dense, with tensor cores; fp32 without."""
SAMPLE = 64  # records that tell the number of candidates and the length of texts


class Count(NamedTuple):
    """One forward of one sample."""

    flops: int
    saved: int
    """Bytes that autograd keeps for the backward pass, parameters left out."""


class Prediction(NamedTuple):
    """What one process needs."""

    trained: int
    total: int
    """Parameters of the network, its LoRA included."""
    forward: Count
    samples: int
    """Forwards with gradient per micro-step."""
    passes: int
    """Forwards of one sample per optimiser step, in units of the policy's: a backward pass is 1 or 2 of them."""
    memory: dict[str, float]
    """Bytes by what they hold."""
    probabilities: float
    """Bytes more where attention keeps its probabilities, as it does on a CPU."""

    @property
    def flops(self) -> float:
        """Per optimiser step."""
        return float(self.passes * self.forward.flops)


def lines(config: TrainConfig, method: Method) -> Iterator[tuple[str, str]]:
    """Name and text of every line to print; a single line says why, when nothing can be predicted."""
    try:
        if config.data is None or config.online is not None:
            raise UserError(f"{method.name} samples while it trains")
        rows = list(islice(store.read(Path(config.data.records)), SAMPLE))
        found = predict(config, method, rows)
    except Exception as error:  # a prediction is never what stops a run
        yield "prediction", f"not predicted: {' '.join(str(error).split()) or type(error).__name__}"
        return
    lora, halved = config.model.lora is not None, config.run.precision == "bf16"
    backward = "1 backward (frozen weights need no gradients)" if lora else "2 backward"
    backward += ", 1 again for checkpointing" if config.model.checkpointing else ""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.memory.items() if size)
    yield "parameters", f"{found.trained / 1e6:.2f} M trained of {found.total / 1e6:.2f} M"
    compute = (
        f"{found.flops / 1e12:.4g} TFLOP per optimiser step and process: {found.passes} times the forward of one "
        f"sample, {found.forward.flops / 1e12:.4g}, counted as 1 policy, {backward} and 1 per frozen role"
    )
    yield "compute", compute
    memory = (
        f"{sum(found.memory.values()) / GIB:.2f} GiB: {parts}; activations: what autograd keeps of {found.samples} "
        f"forwards with fused attention{', halved for bf16' if halved else ''}; the attention of a CPU keeps "
        f"{found.probabilities / GIB:.2f} more"
    )
    yield "memory", memory
    yield "hours", _hours(found.flops * config.run.steps, config.run.precision)


def predict(config: TrainConfig, method: Method, rows: Sequence[Record]) -> Prediction:
    """Count a run of the offline loop on such records.

    Raises:
        UserError: no configs to build the networks from, or no records.
    """
    assert config.data is not None
    if not rows:
        raise UserError(f"{config.data.records}: no records")
    family = sketch(config.model)
    others = sum(_size(part) for part in _frozen_parts(family))
    lora, run = config.model.lora, config.run
    family.net.requires_grad_(lora is None)
    if lora is not None:
        with torch.device("meta"):
            add_lora(family.net, lora.rank, lora.alpha, lora.targets or family.lora_targets)
    if config.model.checkpointing:
        for net in family.networks:
            checkpoint(net)
    trained = sum(p.numel() for p in family.net.parameters() if p.requires_grad)
    total = _size(family.net)
    forward = _forward(family, config, rows)
    count, plainly = counted(forward, fused=True), counted(forward, fused=False)

    k = max(len(row.candidates) for row in rows)
    backward = (1 if lora is not None else 2) + config.model.checkpointing  # whose blocks run forward again
    samples, passes = _passes(method, run.batch * k, backward)
    kept = samples * (0.5 if run.precision == "bf16" else 1.0)
    roles = needs(*method.terms).roles
    held = FROZEN[config.model.quant or config.model.dtype]
    memory = {
        "weights": held * (total - trained) + FLOAT * trained,
        "encoders and VAE, until all is encoded": FLOAT * others,
        "reference": FLOAT * total * (lora is None and "reference" in roles),
        "other roles": held * total * len(config.model.others),
        "gradients": FLOAT * trained,
        "optimiser": FLOAT * trained * _state(config.optim),
        "average": FLOAT * trained * (run.ema is not None),
        "activations": kept * count.saved,
    }
    more = kept * max(plainly.saved - count.saved, 0)
    return Prediction(trained, total, count, samples, run.accumulate * passes, memory, more)


def _passes(method: Method, candidates: int, backward: int) -> tuple[int, int]:
    """Forwards with gradient of a micro-step, and its passes; a term with a draw of its own runs again."""
    samples = passes = 0
    main, *extra = method.terms
    shared = (main, *(term for term in extra if term.draw is None))
    for terms in (shared, *((term,) for term in extra if term.draw is not None)):
        found = candidates * _times(terms[0].draw)
        samples += found
        passes += found * (1 + backward + len(needs(*terms).roles))
    return samples, passes


def _times(draw: Any) -> int:
    """How often a draw noises every candidate."""
    given = draw.keywords if isinstance(draw, partial) else {}
    kind = draw.func if isinstance(draw, partial) else draw
    return given.get("count", signature(kind).parameters["count"].default) if kind is draws.repeated else 1


def _state(optim: OptimConfig) -> float:
    """Numbers that the optimiser keeps per trained one, from a step on a 64 x 64 matrix."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = make_optimizer([parameter], optim)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = (v.numel() for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.ndim)
    return sum(kept) / parameter.numel()


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _frozen_parts(family: Any) -> list[nn.Module]:
    parts = () if family.modality == "text" else family.pipe.components.values()
    return [part for part in parts if isinstance(part, nn.Module) and part is not family.net]


# --- networks without memory ----------------------------------------------------------------------------------------


def sketch(model: ModelConfig) -> Any:
    """A family whose networks are on the meta device: configs and tokenizers are read, weights are not.

    Raises:
        UserError: the configs are not in the folder or in the Hub's cache.
    """
    kind, folder = base.family_class(model.family), _folder(model.path)
    meta = torch.device("meta")
    with foreign_files(f"no network from the configs of {model.path}"), quiet():
        if kind.modality == "text":
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

            with meta:
                net: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            return kind(net, AutoTokenizer.from_pretrained(folder), model.path, meta)
        listed = json.loads((folder / kind.index_file).read_bytes())
        kind = kind.variant(listed.get("_class_name"))
        parts = {name: entry for name, entry in listed.items() if isinstance(entry, list) and name not in kind.options}
        nets = {name: _empty(folder / name, *entry) for name, entry in parts.items() if entry[0] is not None}
        for name, place in model.parts.items():
            found = kind.part_class(name, str(folder))
            inner = name if (Path(place) / "model_index.json").is_file() else ""
            nets[name] = _empty(_folder(place) / inner, found.__module__.partition(".")[0], found.__name__)
        given = {name: net for name, net in nets.items() if net is not None}
        absent = dict.fromkeys(name for name in kind.without if parts.get(name, [None])[0] is None)
        pipe = kind.pipeline_class().from_pretrained(folder, **given, **absent, **kind.options)
        return kind(pipe, model.path, meta)


def _folder(path: str) -> Path:
    """Where the configs of a model are; nothing is downloaded."""
    scheme, _, world = path.partition(":")
    if scheme == "embedded" and world in base.EMBEDDED:
        return base.EMBEDDED[world]
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except Exception:
        raise UserError(f"{path} is neither a folder nor in the Hub's cache") from None


def _empty(folder: Path, library: str, name: str) -> nn.Module | None:
    """A component on the meta device, None for what is no network."""
    if library not in ("diffusers", "transformers"):
        return None
    kind: Any = getattr(import_module(library), name)
    if nn.Module not in kind.__mro__:
        return None
    with torch.device("meta"):
        if library == "transformers":
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(kind.load_config(folder))


# --- counting -------------------------------------------------------------------------------------------------------


def _forward(family: Any, config: TrainConfig, rows: Sequence[Record]) -> Callable[[], Tensor]:
    """The forward of one sample as a run makes it."""
    assert config.data is not None
    if family.modality == "text":
        encoded = (family.encode(plain(r.prompt), plain(c.text)) for r in rows for c in r.candidates if c.text)
        longest = max(len(ids) for ids, _ in encoded)
        length = min(longest, config.data.max_tokens or longest, family.max_tokens or longest)
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, length, length, device="meta")  # made, because making one looks at values

        def speak() -> Tensor:
            logits, _ = family.forward(family.net, ids, mask, None, length, False)
            return token_log_probs(logits[:, :-1], ids[:, 1:])

        return speak
    x_t = torch.zeros(1, *family.latent_shape(config.data.size), device="meta")
    t, cond = torch.zeros(1, device="meta"), family.blank_condition()
    return lambda: family.predict(family.net, x_t, t, cond)


class _Attention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: its inputs and its output. The logarithms are left out."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        groups = query.shape[-3] // key.shape[-3]
        keys, values = (part.repeat_interleave(groups, -3) for part in (key, value))
        out = query @ keys.transpose(-1, -2) @ values
        ctx.save_for_backward(query, key, value, out)
        return out


class _Fused(TorchFunctionMode):
    """Runs that attention in place of torch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named: Mapping[str, Tensor] = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        return _Attention.apply(named["query"], named["key"], named["value"])


def counted(forward: Callable[[], Tensor], fused: bool) -> Count:
    """Run a forward on the meta device and count it; ``fused``: attention does not keep its probabilities."""
    kept: dict[int, Tensor] = {}  # by storage, and alive, so that no storage is counted twice or under another's name

    def keep(tensor: Tensor) -> Tensor:
        if not _of_parameter(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        if fused:
            with _Fused():
                out = forward()
        else:
            out = forward()
    del out
    return Count(counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def _of_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


# --- time -----------------------------------------------------------------------------------------------------------


def _hours(flops: float, precision: str) -> str:
    column = 0 if precision == "bf16" else 1
    here = "" if torch.cuda.is_available() else f", this CPU {_spell(flops / measured(precision))}"
    known = ", ".join(f"{name} {_spell(flops / (1e12 * peak[column]))}" for name, peak in PEAKS.items())
    return f"{known}{here}; at {UTILISATION:.0%} of the {precision} peak (a CPU's: a measured product of matrices)"


def _spell(seconds: float) -> str:
    return f"{seconds / UTILISATION / 3600:.3g}"


def measured(precision: str) -> float:
    """FLOP/s of this CPU, the best of three products of 512 x 512 matrices."""
    side, best = 512, float("inf")
    matrix = torch.ones(side, side, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
