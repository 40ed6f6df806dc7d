"""Which parameters play which role. The only place where a network is switched between roles.

========== ========================================== ==========================================
role        with a LoRA                                 full weights
========== ========================================== ==========================================
policy      adapter on                                  the network
reference   adapter off, or a second adapter            a frozen copy, made on first use
a copy      another adapter, swapped in                 another set of weights, swapped in
any other   a frozen network given by the caller        the same (a guide, the previous iterate ...)
========== ========================================== ==========================================

Copies follow the policy at a decay of their own: ``average`` (an EMA), ``behaviour`` (what samples), ``evaluation``
(what is exported), or a ``reference`` that moves.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffalign import sharding
from diffalign.errors import UserError
from diffalign.types import Role

ROLES = ("policy", "reference", "average", "behaviour", "evaluation")
"""Roles that are made from the trained network."""


def add_lora(net: nn.Module, rank: int, alpha: int | None, targets: Sequence[str]) -> None:
    """Freeze ``net`` and put a trainable LoRA (arXiv:2106.09685) on every module whose name ends in a target.

    The update starts at zero, so that policy = reference at step 0; alpha defaults to the rank (scale 1).

    Raises:
        UserError: a target names no module, or one that cannot have a LoRA.
    """
    from peft import LoraConfig

    net.requires_grad_(False)
    try:
        net.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets)))  # type: ignore[operator]
    except ValueError as error:
        raise UserError(f"model.lora.targets: {error}") from None
    for parameter in net.parameters():
        if parameter.requires_grad:  # whatever the frozen weights are held in
            parameter.data = parameter.data.float()


def continue_lora(net: nn.Module) -> None:
    """Train on from the adapter that is on ``net``, with a frozen second one of the same weights as the reference."""
    net.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that is what is wanted
        net.add_adapter(net.peft_config["default"], adapter_name="reference")  # type: ignore[operator, index]
    for _, layer in _adapted(net):
        for parts in (layer.lora_A, layer.lora_B):
            parts.float()  # whatever the frozen weights are held in
            parts["reference"].load_state_dict(parts["default"].state_dict())
    _activate(net, "default")


def _activate(net: nn.Module, adapter: str) -> None:
    """Let an adapter act, and only its parameters require gradients."""
    for _, layer in _adapted(net):
        layer.set_adapter(adapter)


class LoraLayer(NamedTuple):
    """What a LoRA adds to one module: ``scale * up @ down``."""

    down: Tensor
    """(r, in), of a convolution (r, in, h, w)."""
    up: Tensor
    """(out, r), of a convolution (out, r, 1, 1)."""
    scale: float


def lora_layers(net: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA of a network by the name of the module it is on."""
    return {
        name: LoraLayer(layer.lora_A[key].weight.detach(), layer.lora_B[key].weight.detach(), layer.scaling[key])
        for name, layer in _adapted(net)
        for key in layer.lora_A
    }


def _adapted(net: nn.Module) -> list[tuple[str, Any]]:
    """The modules that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in net.named_modules() if isinstance(module, BaseTunerLayer)]


def remove_lora(net: nn.Module) -> None:
    """Leave the network as it was before it got a LoRA."""
    for name, layer in _adapted(net):
        net.set_submodule(name, layer.get_base_layer())
    del net.peft_config
    net._hf_peft_config_loaded = False  # type: ignore[assignment]  # diffusers and transformers look here


def merge_lora(net: nn.Module) -> None:
    """Add the LoRA to the weights it is on and remove it."""
    for _, layer in _adapted(net):
        layer.merge(safe_merge=True)
    remove_lora(net)


class Weights:
    """The roles of one trained network.

    Args:
        net: the network, with a LoRA from :func:`add_lora` or with full weights to train.
        lora: whether the trainable parameters are an adapter.
        copies: roles held as copies of the trainable parameters, which :meth:`refresh` lets follow the policy.
        others: frozen networks by role, for roles that are neither the policy nor made from it.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        lora: bool,
        copies: Sequence[Role] = (),
        others: Mapping[Role, nn.Module] | None = None,
    ) -> None:
        self.net = net
        self.lora = lora
        self.others = dict(others or {})
        self._reference: nn.Module | None = None
        if not lora:
            net.requires_grad_(True)
        self.copies = {role: self._copy() for role in copies}

    def trainable(self) -> list[nn.Parameter]:
        """The parameters the optimiser sees."""
        return [p for p in self.net.parameters() if p.requires_grad]

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trainable()]

    def prepare(self, roles: Sequence[Role]) -> None:
        """Make what the roles need before training starts: a frozen copy for a full-weight reference.

        Raises:
            UserError: a role that cannot be played.
        """
        for role in roles:
            if role == "average" and role not in self.copies:
                raise UserError("role 'average' is the moving average of the policy: set run.ema")
            if role not in ("policy", "reference", *self.copies, *self.others):
                raise UserError(f"no weights play the role {role!r}: give a folder as model.others.{role}")
        if "reference" in roles and "reference" not in self.copies and not self.lora:
            # still requires_grad: torch picks the matmul kernel by it, and a frozen copy would round differently
            self._reference = copy.deepcopy(self.net)

    def shard(self, blocks: tuple[str, ...]) -> None:
        """Spread the network and its frozen copy over all processes; before an optimiser sees the parameters."""
        for net in (self.net, self._reference):
            if net is not None:
                sharding.shard(net, blocks)
        self.copies = {role: self._copy() for role in self.copies}

    @contextmanager
    def use(self, role: Role) -> Iterator[nn.Module]:
        """The network as it plays ``role``. Only the policy may be used with gradient."""
        if role == "policy":
            yield self.net
        elif role in self.others:
            yield self.others[role]
        elif role in self.copies:
            with self._swapped(self.copies[role]):
                yield self.net
        elif role == "reference" and "reference" in getattr(self.net, "peft_config", ()):
            _activate(self.net, "reference")
            try:
                yield self.net
            finally:
                _activate(self.net, "default")
        elif role == "reference" and self.lora:
            self.net.disable_adapters()  # type: ignore[operator]
            try:
                yield self.net
            finally:
                self.net.enable_adapters()  # type: ignore[operator]
        elif role == "reference" and self._reference is not None:
            yield self._reference
        else:
            raise RuntimeError(f"role {role!r} was not prepared")

    @contextmanager
    def _swapped(self, values: list[Tensor]) -> Iterator[None]:
        held = self._copy()
        self._write(values)
        try:
            yield
        finally:
            self._write(held)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.trainable(), values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def refresh(self, role: Role, decay: float) -> None:
        """``copy <- decay * copy + (1 - decay) * policy``; a decay of 0 copies."""
        for held, parameter in zip(self.copies[role], self.trainable(), strict=True):
            held.lerp_(parameter.detach(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Trainable parameters by name, and those of copies under ``<role>.<name>``."""
        names = [n for n, p in self.net.named_parameters() if p.requires_grad]
        state = {n: p.detach() for n, p in zip(names, self.trainable(), strict=True)}
        for role, held in self.copies.items():
            state |= {f"{role}.{name}": value for name, value in zip(names, held, strict=True)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            UserError: the checkpoint holds other parameters than this run trains.
        """
        mine = self.state_dict()
        if mine.keys() != state.keys() or any(mine[n].shape != state[n].shape for n in mine):
            raise UserError(
                "the checkpoint was written by a run with other trained parameters (model, LoRA, EMA, anchors)"
            )
        for name, value in mine.items():
            value.copy_(sharding.like(state[name], value))
