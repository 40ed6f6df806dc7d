"""The run directory: devices, seeds by position, logs, atomic checkpoints, resume.

::

    DIR/config.yaml            the merged configuration
    DIR/run.json               versions, command, seconds
    DIR/metrics.jsonl          a line per step
    DIR/tensorboard/
    DIR/checkpoint-000040/     weights.safetensors, state.pt
    DIR/snapshots/000040/      a LoRA as in DIR/lora, with run.snapshots
    DIR/lora/                  final weights; for full weights the network's own folder, transformer/ or unet/
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.files import remove_folder, replacing, replacing_folder, sweep, write_json, writing
from diffalign.foreign import tensor_digest
from diffalign.machine import versions
from diffalign.sharding import is_sharded, spread_optimizer, whole, whole_optimizer
from diffalign.weights import Weights

SHORT = 128  # positions; at 64 plain products win, at 256 the fused kernel does


def peak_memory(device: torch.device) -> float:
    """GiB: the most this process has allocated on a GPU, or had resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run directory by the step they were written at, oldest first."""
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdigit()))


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots of a run directory by step, oldest first."""
    found = {path.name: path for path in folder.glob("snapshots/*")}
    return dict(sorted((int(name), path) for name, path in found.items() if name.isdigit()))


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from, None to start at step 0.

    Raises:
        UserError: the run directory holds something and ``resume`` was not asked for, or there is no such checkpoint.
    """
    if resume is None:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"run.dir: {folder} is not empty; --resume latest continues it, or choose another")
        return None
    if resume == "latest":
        return next(reversed(checkpoints(folder).values()), None)
    if not (Path(resume) / "state.pt").is_file():
        raise UserError(f"run.resume: {resume} is not a checkpoint folder (no state.pt in it); try `latest`")
    return Path(resume)


class Run:
    """One training run on this process's device.

    Args:
        folder: the run directory.
        device: where the network lives.
        precision: ``fp32``, or ``bf16`` autocast, the same for every role.
        seed: all randomness derives from it and from the position in the run.
        keep: checkpoints to keep.
    """

    def __init__(self, folder: Path, device: torch.device, precision: str, seed: int, keep: int) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")  # precision: see autocast
        self.folder = folder
        self.device = device
        self.precision = precision
        self.seed = seed
        self.keep = keep
        self.rollbacks = 0
        """How often this run went back to a checkpoint; each time halves the learning rate."""
        self.extra: dict[str, Any] = {}
        """What the checkpoint that was loaded last held beside the weights."""
        self.started = time.perf_counter()
        self._cpu = time.process_time()
        self._writer: Any = None

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    # --- numerics -----------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager:
        """The precision context that every role of a step runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def kernels(self, positions: int) -> AbstractContextManager:
        """Which attention kernels a step uses, its backward pass included: checkpointed blocks run again there.

        Args:
            positions: tokens, or places of a latent.
        """
        if self.device.type != "cpu" or positions > SHORT:
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # the fused kernel's backward is slower than plain products where sequences are short
        return sdpa_kernel(SDPBackend.MATH)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.world > 1 else tensor  # type: ignore[return-value]

    def mean_over_ranks(self, tensor: Tensor) -> Tensor:
        """Mean over the elements of every process."""
        total, count = self.sum_over_ranks(torch.stack([tensor.sum(), tensor.new_tensor(float(tensor.numel()))]))
        return total / count

    def check_ranks(self, step: int, weights: Weights) -> None:
        """Every process must hold the same weights, to the bit.

        Raises:
            UserError: they have drifted apart, which nothing later would mend.
        """
        if self.world == 1:
            return
        held = ((name, value) for name, value in sorted(weights.state_dict().items()) if not is_sharded(value))
        digest = tensor_digest(held)
        mine = torch.tensor([int(digest[:15], 16)], device=self.device)
        found: Any = self.accelerator.gather(mine)
        if len(found.unique()) > 1:
            raise UserError(f"step {step}: the weights of the {self.world} processes differ; resume from a checkpoint")

    # --- directory ----------------------------------------------------------------------------------------------

    def open(self, config_yaml: str, resume: str | None) -> Path | None:
        """Create or re-enter the directory; the checkpoint to continue from, None to start at step 0.

        Raises:
            UserError: the directory holds something and ``resume`` was not asked for, or there is no such checkpoint.
        """
        checkpoint = find_checkpoint(self.folder, resume)
        self.accelerator.wait_for_everyone()  # every rank has looked before one of them writes
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            with replacing(self.folder / "config.yaml") as handle:
                handle.write(config_yaml.encode())
        self.accelerator.wait_for_everyone()
        return checkpoint

    def log(self, step: int, metrics: Mapping[str, float], alarms: Mapping[str, str]) -> None:
        """Append a line to metrics.jsonl and to TensorBoard; ``alarms`` are name -> text."""
        if not self.is_main:
            return
        now = time.process_time()
        cost = {
            "seconds": round(time.perf_counter() - self.started, 3),
            "cpu": round(now - self._cpu, 3),  # since the line before
            "memory": round(peak_memory(self.device), 3),
        }
        self._cpu = now
        line = {"step": step, **cost, **metrics, **({"alarms": dict(alarms)} if alarms else {})}
        path = self.folder / "metrics.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        with writing(self.folder / "tensorboard"):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder / "tensorboard"))
            for name, value in {**metrics, "memory": cost["memory"]}.items():
                self._writer.add_scalar(name, value, step)

    def past_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far, for the process that writes them."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if self.is_main and path.is_file() else []
        return [json.loads(line) for line in lines]

    def forget_after(self, step: int) -> None:
        """Drop metrics and checkpoints of later steps, which this run will take again."""
        if not self.is_main:
            return
        for later, path in checkpoints(self.folder).items():
            if later > step:
                remove_folder(path)
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            with replacing(path) as handle:
                handle.write("".join(line for line in lines if _step_of(line) <= step).encode())

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        extra: Mapping[str, Any],
    ) -> None:
        """Write ``checkpoint-<step>`` whole or not at all, and drop the oldest beyond ``keep``.

        Args:
            extra: plain values that :attr:`extra` holds once the checkpoint is loaded.
        """
        self.check_ranks(step, weights)
        tensors = {name: whole(value).contiguous() for name, value in weights.state_dict().items()}
        learnt = whole_optimizer(optimizer)
        if not self.is_main:
            return
        target = self.folder / f"checkpoint-{step:06d}"
        with replacing_folder(target) as aside:
            save_file(tensors, aside / "weights.safetensors")
            state = {
                "step": step,
                "run.seed": self.seed,
                "rollbacks": self.rollbacks,
                "optim.name": type(optimizer).__name__,
                "optimizer": learnt,
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "extra": dict(extra),
            }
            torch.save(state, aside / "state.pt")
        for old in list(checkpoints(self.folder).values())[: -self.keep]:
            remove_folder(old)

    def restore(self, checkpoint: Path, weights: Weights, optimizer: torch.optim.Optimizer, scheduler: Any) -> int:
        """Load a checkpoint (tensors only, nothing is unpickled); the step it was written at.

        What the optimiser has learnt comes from the checkpoint, learning rate and other settings from the config.
        """
        try:
            state = _load_state(checkpoint / "state.pt")
            tensors = load_file(checkpoint / "weights.safetensors", device=str(self.device))
        except Exception as error:
            reason = f"not a readable checkpoint ({type(error).__name__})"
            raise UserError(f"{checkpoint}: {reason}; delete it or resume from another") from None
        for name, mine in (("run.seed", self.seed), ("optim.name", type(optimizer).__name__)):
            if state.get(name) != mine:
                raise UserError(f"{checkpoint}: was written with {name}={state.get(name)}, this run has {mine}")
        try:
            weights.load_state_dict(tensors)
            _restore_optimizer(optimizer, scheduler, state)
            torch.set_rng_state(state["rng"])
            self.soften(int(state.get("rollbacks", 0)), optimizer, scheduler)
            self.extra = dict(state.get("extra", {}))
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None
        except Exception as error:
            raise UserError(f"{checkpoint}: its state does not fit this run: {error}; resume from another") from None
        return state["step"]

    def soften(self, rollbacks: int, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Set how often the run has gone back, and the learning rate accordingly."""
        scheduler.base_lrs = [rate * 0.5 ** (rollbacks - self.rollbacks) for rate in scheduler.base_lrs]
        self.rollbacks = rollbacks
        schedules = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, factor in schedules:
            group["lr"] = base * factor(scheduler.last_epoch)

    def snapshot(self, step: int, export: Callable[[Path], None]) -> None:
        """Keep the weights of a step in the form of final ones, whole or not at all."""
        if self.is_main:
            with replacing_folder(self.folder / "snapshots" / f"{step:06d}") as aside:
                export(aside)

    def finish(self, name: str, export: Callable[[Path], None]) -> None:
        """Write the final weights into the sub-folder ``name``, whole or not at all, and close the logs."""
        if self._writer is not None:
            self._writer.close()
        if not self.is_main:
            return
        with replacing_folder(self.folder / name) as aside:
            export(aside)
        seconds = round(time.perf_counter() - self.started, 1)
        write_json(self.folder / "run.json", {"command": sys.argv[1:], "seconds": seconds, "versions": versions()})


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that a crash cut off."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _load_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.pt, on the CPU."""
    with warnings.catch_warnings(action="ignore"):  # torch remarks on odd pickles before it refuses them
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state["step"], int) or state["step"] < 0:
        raise ValueError("step")
    return state


def _restore_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, state: dict[str, Any]) -> None:
    """Moments and position from the checkpoint; the settings of this run's config stay."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(spread_optimizer(state["optimizer"], optimizer))
    position = {key: state["scheduler"][key] for key in scheduler.state_dict() if key != "base_lrs"}
    scheduler.load_state_dict(position)
    schedules = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, own, (base, factor) in zip(optimizer.param_groups, settings, schedules, strict=True):
        group.update(own, lr=base * factor(scheduler.last_epoch))
