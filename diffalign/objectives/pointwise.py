"""Objectives over one candidate at a time: imitation, desirable or not, real or generated, divergences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.objectives.links import logistic
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss

NLL = Literal["token", "sequence", "sum"]


def _nll(lp: LogProbs, weight: Tensor, reduction: NLL) -> Loss:
    """Negative log-prob of the candidates (B, K) that a weight counts."""
    if reduction == "sum":
        return Loss(-lp.sum(), weight)
    return Loss(-lp.mean(), weight * lp.mask.sum(-1).to(weight.dtype) if reduction == "token" else weight)


def best(lp: LogProbs, labels: Labels) -> Tensor:
    """(B, K): 1 for the candidates of the highest reward, and for the only one; 0 where all are equal."""
    reward, here = labels["reward"], lp.exists > 0
    highest = reward.masked_fill(~here, -torch.inf).amax(1, keepdim=True)
    lowest = reward.masked_fill(~here, torch.inf).amin(1, keepdim=True)
    chosen = (reward == highest) & here & ((highest > lowest) | (here.sum(1, keepdim=True) == 1))
    return chosen.to(lp.exists.dtype)


@objective(k=None, paper="arXiv:2404.19733, NLL term of its loss equation; TRL 'sft'")
def sft(lp: LogProbs, labels: Labels, *, reduction: NLL = "token") -> Loss:
    """Negative log-prob of the best candidate of each record: imitation, and the regulariser of pair losses.

    For diffusion the log-prob is ``-scale * error``: the denoising loss at scale 1.

    Args:
        lp: policy log-probs, (B, K, U).
        labels: ``reward`` (B, K); of equal bests each counts, records of ties alone do not, a single candidate does.
        reduction: ``token``, the mean over all units of the batch (TRL; RPO weighs it 0.005, iterative reasoning 1);
            ``sequence``, the mean over records of means per unit (iterative reasoning's NLL / length); ``sum``, of
            sums (SLiC-HF).
    """
    return _nll(lp, best(lp, labels), reduction)


@objective(k=None, paper="arXiv:2203.02155, section 3.5 SFT equation", labels=())
def sft_all(lp: LogProbs, labels: Labels, *, reduction: NLL = "token") -> Loss:
    """Negative log-prob of every candidate: imitation of demonstrations, which need no label.

    Args:
        lp: policy log-probs, (B, K, U).
        labels: none.
        reduction: as of ``sft``.
    """
    return _nll(lp, lp.exists, reduction)


def verdicts(lp: LogProbs, labels: Labels) -> tuple[Tensor, Tensor]:
    """(B, K) each: 1 for desirable and 1 for undesirable candidates; a label that is neither 1 nor 0 is neither."""
    desirable = labels["desirable"]
    return (desirable == 1) * lp.exists, (desirable == 0) * lp.exists


def reference_point(lp: LogProbs) -> Tensor:
    """The mean log-ratio over batch and ranks, at least 0, without gradient: of mismatched completions if given."""
    ratio = lp.extra.get("mismatched", lp.ratio()).detach()
    here = lp.exists if ratio.shape == lp.exists.shape else torch.ones_like(ratio)
    total = lp.world_mean(torch.where(here > 0, ratio, 0.0))
    return (total / lp.world_mean(here).clamp_min(torch.finfo(total.dtype).tiny)).clamp_min(0)


@objective(
    k=None,
    paper="arXiv:2402.01306 eq. 7; diffusion: arXiv:2404.04465, loss equation",
    roles=("reference",),
    labels=("desirable",),
    reads=("text:mismatched",),
)
def kto(
    lp: LogProbs,
    labels: Labels,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    utility: Literal["sigmoid", "loss_averse", "risk_seeking_3"] = "sigmoid",
) -> Loss:
    """KTO: ``lambda (1 - U(y beta (h - z0)))`` with y = 1 for desirable and -1 for undesirable candidates.

    ``z0`` is the mean log-ratio, at least 0, over the batch and all ranks, without gradient. Diffusion-KTO ships the
    mean over the batch itself. For text it is that of mismatched completions, ``extra["mismatched"]`` (B, K) of the
    estimate; all rows count, as in TRL (HALOs skips empty ones). One class alone is legal.

    Args:
        lp: policy and reference log-probs, (B, K, U).
        labels: ``desirable`` (B, K), 1 or 0, anything else has weight 0.
        beta: strength, 1 / log-prob; 5000 at scale 1 for diffusion (example script: 1000), 0.1 for text.
        desirable_weight: lambda of desirable candidates; 1 in the papers. Keep the ratio of the two classes' summed
            weights within 1 to 4/3 (TRL warns).
        undesirable_weight: lambda of the others; 1 in the papers.
        utility: U; ``sigmoid``, ``loss_averse`` log sigmoid(z), ``risk_seeking_3`` -log sigmoid(-z).
    """
    liked, disliked = verdicts(lp, labels)
    z = beta * (liked - disliked) * (lp.ratio() - reference_point(lp))
    if utility == "sigmoid":
        shortfall = torch.sigmoid(-z)
    else:
        shortfall = 1 + logistic(z) if utility == "loss_averse" else 1 - logistic(-z)
    factor = desirable_weight * liked + undesirable_weight * disliked
    return Loss(factor * shortfall, liked + disliked)


@objective(k=None, paper="arXiv:2503.01103, loss equation", roles=("reference",), labels=("desirable",))
def ddo(
    lp: LogProbs, labels: Labels, *, alpha: float, beta: float, divide_by_max_alpha: bool = False
) -> tuple[Loss, ...]:
    """DDO: ``mean over real of -log sigmoid(beta h) + alpha mean over fake of -log sigmoid(-beta h)``.

    Fake samples come from the reference. Two means, so that the shares of a batch do not matter. The optimum is
    ``reference^(1 - 1/beta) data^(1/beta)``, sharper than the data for beta < 1.

    Args:
        lp: policy and reference log-probs, (B, K, U); published betas are per summed squared error.
        labels: ``desirable`` (B, K): 1 real, 0 fake.
        alpha: weight of the fake samples; 0.5 to 50 for diffusion, 10 to 100 for autoregressive models.
        beta: strength, 1 / log-prob; 0.01 to 0.1.
        divide_by_max_alpha: divide both by max(alpha, 1), as a third-party port does.
    """
    real, fake = verdicts(lp, labels)
    logit = beta * lp.ratio()
    total = max(alpha, 1.0) if divide_by_max_alpha else 1.0
    return Loss(logistic(logit) / total, real), Loss(alpha / total * logistic(-logit), fake)


@objective(k=None, paper="arXiv:2410.04166, loss equation", labels=("desirable",), fits=("text",))
def pmpo(lp: LogProbs, labels: Labels, *, alpha: float = 0.5) -> tuple[Loss, ...]:
    """PMPO: ``-alpha mean over accepted of a + (1 - alpha) mean over rejected of a``, log-probs summed over tokens.

    Two means; a side without samples drops out. To be used with ``forward_kl`` on samples of the reference, whose
    weight (the paper's beta) must be of order 1 or more to keep learning from rejected samples alone stable. That KL
    must not be estimated on the accepted and rejected samples: above 1 - alpha the sum would be weighted SFT.

    Args:
        lp: policy log-probs, (B, K, U).
        labels: ``desirable`` (B, K): 1 accepted, 0 rejected, anything else neither.
        alpha: weight of the accepted; 1/2 weighs both alike, 0 learns from rejected samples alone.
    """
    accepted, rejected = verdicts(lp, labels)
    return Loss(-alpha * lp.sum(), accepted), Loss((1 - alpha) * lp.sum(), rejected)


def _samples(lp: LogProbs, labels: Labels) -> Tensor:
    """(B, K): 1 for candidates without a verdict."""
    if "desirable" not in labels:
        return lp.exists
    liked, disliked = verdicts(lp, labels)
    return lp.exists - liked - disliked


@objective(
    k=None, paper="arXiv:2410.04166, KL term of the loss equation", roles=("reference",), labels=(), fits=("text",)
)
def forward_kl(lp: LogProbs, labels: Labels) -> Loss:
    """KL(reference || policy) from samples of the reference: ``mean of log reference - log policy``.

    Args:
        lp: policy and reference log-probs, (B, K, U), of completions that the reference wrote.
        labels: where another objective of the batch brings ``desirable`` (B, K), candidates with a verdict (1 or 0)
            are its data rather than samples of the reference, and do not count.
    """
    return Loss(-lp.ratio(), _samples(lp, labels))


@objective(
    k=None, paper="arXiv:2410.04166, KL term of the loss equation", labels=(), reads=("forward_kl",), fits=("text",)
)
def forward_kl_exact(lp: LogProbs, labels: Labels) -> Loss:
    """KL(reference || policy) over the whole vocabulary at every token of a completion, summed over its tokens.

    Args:
        lp: ``extra["forward_kl"]`` (B, K, U) of completions that the reference wrote.
        labels: as of ``forward_kl``.
    """
    value = lp.counted(lp.extra["forward_kl"]).sum(-1)
    return Loss(value, _samples(lp, labels))


@objective(k=None, paper="arXiv:2410.11677, regulariser equation", roles=("reference",))
def likelihood_floor(lp: LogProbs, labels: Labels, *, margin: float = 1.0) -> Loss:
    """``softplus(margin - h)`` of the best candidate: a smooth hinge that keeps it above the reference.

    Args:
        lp: policy and reference log-probs, (B, K, U).
        labels: ``reward`` (B, K); records of ties alone have weight 0.
        margin: in nats; 1 in the paper.
    """
    return Loss(logistic(lp.ratio() - margin), best(lp, labels))
