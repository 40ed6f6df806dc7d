"""One optimiser step from any number of micro-steps: the reduction ``sum(w v) / sum(w)``, exact everywhere.

Micro-steps add up the gradients of the *sums*; the division by the total weight, over all micro-steps and ranks,
comes last. So neither accumulation nor sharding changes the loss, whatever ties or padding each part holds. Gradients
are summed across ranks here, once per step, and no wrapper ever sees the network: roles switch freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffalign.sharding import is_sharded, whole
from diffalign.train.step import StepResult, TermLoss


class Update:
    """Accumulates :class:`StepResult` values with ``add``, then ``collect``, then ``apply``.

    Args:
        parameters: what the optimiser trains.
        reduce: sums a tensor over all ranks; identity on one device.
        clip: gradient norm clip, None for none.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        reduce: Callable[[Tensor], Tensor],
        clip: float | None,
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.reduce = reduce
        self.clip = clip
        self._grads: dict[int, list[Tensor | None]] = {}
        self._sums: dict[int, Tensor] = {}
        self._factors: dict[int, float] = {}

    def add(self, result: StepResult, *, alone: bool = False) -> None:
        """Back-propagate one micro-step; every part keeps its own gradients, since it has its own total weight.

        Args:
            alone: no other micro-step belongs to this step, so total weights are known and one pass serves all parts.
        """
        terms = self._merged(result.terms) if alone and len(result.terms) > 1 else result.terms
        last = len(terms) - 1
        for index, term in enumerate(terms):
            held = self._grads.get(index, [None] * len(self.parameters))
            for parameter, grad in zip(self.parameters, held, strict=True):
                parameter.grad = grad
            if term.total.requires_grad:  # a part may be constant, for example all padding
                term.total.backward(retain_graph=index < last)
            self._grads[index] = [p.grad for p in self.parameters]
            sums = torch.stack([term.total.detach(), term.weight])
            self._sums[index] = self._sums.get(index, torch.zeros_like(sums)) + sums
            self._factors[index] = term.factor

    def _merged(self, terms: Sequence[TermLoss]) -> tuple[TermLoss]:
        """One part in place of several: divided by the total weights over all ranks, so that its own is 1 in sum."""
        weights = self.reduce(torch.stack([term.weight for term in terms]))
        weights = weights.clamp_min(torch.finfo(weights.dtype).tiny)
        values = [term.factor * term.total / weight for term, weight in zip(terms, weights, strict=True)]
        return (TermLoss(torch.stack(values).sum(), 1 / self.reduce(torch.ones_like(weights[0])), 1.0),)

    def collect(self) -> dict[str, float]:
        """Divide by the total weights, sum over ranks and clip; the gradients are then ready for :meth:`apply`.

        Returns:
            ``loss`` over all micro-steps and ranks, ``grad_norm`` before clipping, ``lr``, and ``grad_live``, the
            share of parameter tensors that received any gradient.
        """
        loss = 0.0
        combined = [torch.zeros_like(p) for p in self.parameters]
        for index, held in self._grads.items():
            total, weight = self.reduce(self._sums[index])
            factor = self._factors[index] / float(weight.clamp_min(torch.finfo(weight.dtype).tiny))
            loss += factor * float(total)
            for out, grad in zip(combined, held, strict=True):
                out.add_(self._summed(torch.zeros_like(out) if grad is None else grad), alpha=factor)
        for parameter, grad in zip(self.parameters, combined, strict=True):
            parameter.grad = grad
        live = sum(bool(whole(g.any())) for g in combined) / len(combined)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip if self.clip is not None else float("inf"))
        self._grads.clear()
        self._sums.clear()
        return {
            "loss": loss,
            "grad_norm": float(whole(norm)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_live": live,
        }

    def _summed(self, grad: Tensor) -> Tensor:
        """A gradient over all ranks; that of a sharded parameter is so already."""
        return grad if is_sharded(grad) else self.reduce(grad)

    def apply(self) -> None:
        """Step the optimiser and the schedule."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
