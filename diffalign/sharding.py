"""Full weights spread over processes (FSDP2): each holds a part of every parameter, gradient and moment.

A frozen reference is sharded like the policy. Checkpoints and exports hold whole tensors, so that any number of
processes can go on from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.networks import repeated_blocks


def shard(net: nn.Module, blocks: tuple[str, ...]) -> None:
    """Shard a network over all processes, block by block; gradients of processes are added up, not averaged."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not dist.is_initialized():
        raise UserError("run.shard: there is one process; start several with `torchrun -m diffalign train ...`")
    device = next(net.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for module in (*repeated_blocks(net, blocks), net):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole(value: Any) -> Any:
    """A tensor put together from all processes, each of which must ask; anything else as it is."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor spread as ``example`` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)


def whole_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state with whole tensors; each process must ask."""
    state = optimizer.state_dict()
    entries = {index: {key: whole(v) for key, v in entry.items()} for index, entry in state["state"].items()}
    return {**state, "state": entries}


def spread_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Inverse of :func:`whole_optimizer`: moments are spread as their parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        index: {
            key: like(v, parameters[index]) if isinstance(v, Tensor) and v.shape == parameters[index].shape else v
            for key, v in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": spread}


def gathered(net: nn.Module) -> nn.Module:
    """A network on the CPU with the whole weights of a sharded one; each process must ask."""
    state = {name: whole(value).cpu() for name, value in net.state_dict().items()}
    kind: Any = next(base for base in type(net).__mro__ if not base.__name__.startswith("FSDP"))
    config: Any = net.config
    with torch.device("meta"):
        plain = kind.from_config(config) if hasattr(kind, "load_config") else kind(config)
    plain.load_state_dict(state, assign=True)
    return plain
