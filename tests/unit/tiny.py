"""A random SD3 transformer of a few thousand parameters behind the diffusion protocol, without encoders or VAE."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.schedule import Rectified
from diffalign.types import Batch
from diffalign.weights import add_lora

TARGETS = ("attn.to_q", "attn.to_v", "attn.add_k_proj")


def transformer(seed: int = 0) -> nn.Module:
    """In evaluation mode and frozen, as a family leaves it; its output is not zero as at diffusers' initialisation."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    net = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=2, out_channels=2, num_layers=2, num_attention_heads=2,
        attention_head_dim=4, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5,
        pos_embed_max_size=2,
    )  # fmt: skip
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


def with_lora(seed: int = 0) -> nn.Module:
    net = transformer(seed)
    add_lora(net, 2, None, TARGETS)
    return net


def perturb(net: nn.Module, seed: int = 1) -> None:
    """Move what is trainable, as some training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def forward(net: nn.Module, seed: int = 3) -> Tensor:
    """The prediction of a network on fixed inputs."""
    batch = pairs(2, seed)
    cond = {name: value[:, 0] for name, value in batch.cond.items()}
    return Family(net).predict(net, batch.x0[:, 0], torch.tensor([0.3, 0.8]), cond)


def pairs(b: int = 3, seed: int = 3, k: int = 2) -> Batch:
    """(b, k, 2, 4, 4) latents with one prompt per record, and distinct rewards."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(b, k, 2, 4, 4, generator=generator)
    states, pooled = torch.randn(b, 1, 3, 6, generator=generator), torch.randn(b, 1, 5, generator=generator)
    return Batch(x0, {"states": states, "pooled": pooled}, {"reward": torch.rand(b, k, generator=generator)})


class Family:
    """What draws and estimators need, on a bare network."""

    name = "tiny"
    modality = "image"

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.schedule = Rectified()

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return net(
            hidden_states=x_t, encoder_hidden_states=cond["states"], pooled_projections=cond["pooled"],
            timestep=self.schedule.native(t), return_dict=False,
        )[0]  # fmt: skip


@dataclass
class Watched:
    """A family of gains, one per role: ``prediction = gain * (x_t + t + tilt)``. It notes every forward."""

    gains: dict[str, nn.Parameter]
    schedule: Any = field(default_factory=Rectified)
    log: list[tuple] = field(default_factory=list)
    playing: list[str] = field(default_factory=list)
    name: str = "watched"
    modality: str = "image"

    @classmethod
    def of(cls, **gains: float) -> "Watched":
        return cls({role: nn.Parameter(torch.tensor(gain)) for role, gain in gains.items()})

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Parameter]:
        """The ``Weights`` side: roles never overlap."""
        assert not self.playing, f"{role} starts while {self.playing} plays"
        self.playing.append(role)
        try:
            yield self.gains[role]
        finally:
            self.playing.pop()

    def predict(self, net: nn.Parameter, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        (role,) = self.playing
        assert net is self.gains[role]
        self.log.append((role, len(x_t), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        assert len(x_t) == len(t) == len(cond["tilt"])
        trailing = (-1, *[1] * (x_t.ndim - 1))
        return net * (x_t + t.reshape(trailing) + cond["tilt"].reshape(trailing))
