"""The losses of the installed trl, called on given log-probs: its own methods run, with a stand-in for the trainer."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class _Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


class _Idle(torch.nn.Module):
    """The trainer's own model, which is asked how it is and never run."""

    is_gradient_checkpointing = False
    is_activation_checkpointing = False


def _trainer(**settings: Any) -> SimpleNamespace:
    base = {
        "accelerator": _Accelerator(),
        "model": _Idle().eval(),
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "aux_loss_enabled": False,
        "use_weighting": False,
        "ld_alpha": None,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_weights": [1.0],
        "precompute_ref_logps": False,
    }
    return SimpleNamespace(**{**base, **settings})


class _Network:
    """Returns given per-token log-probs, as trl's fused head does; masked tokens are 0."""

    def __init__(self, log_probs: Tensor, mask: Tensor) -> None:
        self.log_probs = log_probs * mask
        self.training = False

    def __call__(self, **kwargs: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.log_probs)
        fields = dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), zeros)
        return SimpleNamespace(log_probs=self.log_probs, is_top1=zeros > 0, **fields)


def dpo(loss_type: str, policy: Tensor, reference: Tensor, mask: Tensor, *, beta: float, **settings: Any) -> Tensor:
    """``DPOTrainer``'s loss on log-probs (B, 2, U), the chosen first, metrics included."""
    from trl import DPOTrainer

    tokens, frozen, counted = (value.transpose(0, 1).flatten(0, 1) for value in (policy, reference, mask))
    shape = (counted.shape[0], counted.shape[1] + 1)
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros_like(counted[:, :1]), counted], 1).long(),
    }
    trainer = _trainer(beta=beta, loss_types=[loss_type], ref_model=_Network(frozen, counted), **settings)
    return DPOTrainer._compute_loss(trainer, _Network(tokens, counted), inputs, False)


def cpo(loss_type: str, policy: Tensor, *, beta: float, gamma: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """``CPOTrainer``'s loss per pair on sequence log-probs (B, 2)."""
    from trl.experimental.cpo import CPOTrainer

    trainer = _trainer(beta=beta, loss_type=loss_type, simpo_gamma=gamma, alpha=0.0, label_smoothing=label_smoothing)
    return CPOTrainer.cpo_loss(trainer, policy[:, 0], policy[:, 1])[0]


def orpo_ratio(policy: Tensor, *, beta: float) -> Tensor:
    """``ORPOTrainer``'s odds ratio term per pair, to be subtracted, on mean log-probs (B, 2)."""
    from trl.experimental.orpo import ORPOTrainer

    return ORPOTrainer.odds_ratio_loss(_trainer(beta=beta), policy[:, 0], policy[:, 1])[0]


def kto(
    policy: Tensor,
    reference: Tensor,
    mask: Tensor,
    desirable: Tensor,
    mismatched: Tensor,
    *,
    beta: float,
    weights: tuple[float, float],
) -> Tensor:
    """``KTOTrainer``'s loss on log-probs (B, U) and mismatched log-ratios (B,), metrics included."""
    from trl import KTOTrainer

    shape = (mask.shape[0], mask.shape[1] + 1)
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long(),
        "label": desirable.bool(),
    }
    ratios = iter([mismatched, torch.zeros_like(mismatched)])  # of the policy, then of the reference
    trainer = _trainer(
        beta=beta,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        ref_model=_Network(reference, mask),
        _compute_kl_logps=lambda model, batch: next(ratios),
    )
    return KTOTrainer._compute_loss(trainer, _Network(policy, mask), inputs, False)
