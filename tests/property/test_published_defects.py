"""Defects of published training code that must not return; those pinned elsewhere are listed with their test."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.dataset import Dataset
from diffalign.records import Candidate, Record
from diffalign.registry import OBJECTIVES, find_objective, keyword_parameters
from diffalign.train import offline
from diffalign.types import LogProbs
from diffalign.weights import Weights

from . import linear, registry_cases

ELSEWHERE = {
    "ties counted as wins": "test_identities_core.py::test_a_tie_is_not_a_win_of_the_first_image",
    "ties counted as wins, in every objective": "test_objectives.py::test_ties_alone_give_exactly_nothing",
    "the label of row 0 applied to the batch": "test_identities_core.py::test_a_soft_label_belongs_to_its_own_pair",
    "the time of row 0 applied to the batch": "../unit/test_inversion.py::test_every_record_has_its_own_time",
    "errors of a video reduced over C, H, W alone": (
        "test_identities_core.py::test_errors_of_a_video_are_means_over_its_frames_too"
    ),
    "the inverted ratio of ORPO": "test_identities_core.py::test_a_larger_error_on_the_winner_is_never_rewarded",
    "the batch averaged through an empty tuple of dimensions": (
        "test_identities_online.py::test_the_guards_bias_is_each_samples_own"
    ),
    "errors of scalars averaged over the batch": "../unit/test_likelihood.py::test_an_error_of_scalars_keeps_its_shape",
    "gradients of several processes not summed": "test_update.py::test_two_ranks_train_like_one",
    "means of micro-steps averaged": "test_update.py::test_any_cut_gives_the_same_loss_and_gradient",
    "smoothing of the wrong order": "../unit/test_pair.py::test_label_smoothing_mixes_both_orders",
    "a gradient clip that sees no parameters": (
        "test_update.py::test_clipping_scales_the_gradient_and_reports_the_norm_before"
    ),
    "exp(x) - 1 without digits": "test_identities_core.py::test_the_link_of_mapo_is_exact",
    "an average that shadows the policy": (
        "../unit/test_weights.py::test_an_average_at_decay_zero_is_the_policy_and_holds_no_alias"
    ),
}


@pytest.mark.parametrize("defect", ELSEWHERE)
def test_it_is_pinned_elsewhere(defect):
    file, name = ELSEWHERE[defect].split("::")
    assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


# --- independent flips and crops of winner and loser -----------------------------------------------------------------


class Pixels:
    """A family whose latents are the pixels it was given."""

    name, fingerprint = "pixels", "0"

    modality, reads_condition, aligned_condition = "image", False, False

    def sample_size(self, size):
        return size or (8, 8)

    def encode_prompt(self, prompts):
        return {"states": torch.zeros(len(prompts), 1)}

    def latent_shape(self, size):
        return 3, *size

    def encode_geometry(self, views):
        return {}

    def encode_media(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        return samples, torch.full_like(samples, -30.0)

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None) -> Tensor:
        return mean


def test_both_images_of_a_pair_are_cut_alike_and_never_mirrored(tmp_path):
    """Salesforce's script flips and crops winner and loser independently, so that they differ by more than quality."""
    columns = np.broadcast_to(np.arange(24, dtype=np.uint8)[None, :, None] * 10, (12, 24, 3))
    for name in ("a.png", "b.png"):
        Image.fromarray(np.ascontiguousarray(columns)).save(tmp_path / name)
    pair = [Candidate(sample=name, labels={"reward": float(i)}) for i, name in enumerate(("a.png", "b.png"))]
    seen = []
    for run in range(2):
        data = Dataset([Record(id="0", prompt="p", candidates=pair)], tmp_path, Pixels(), tmp_path / f"cache{run}")
        torch.manual_seed(run)
        seen.append(data.batch([0], torch.Generator().manual_seed(run), ("reward",)).x0)
    assert seen[0].shape == (1, 2, 3, 8, 8)
    assert torch.equal(seen[0][:, 0], seen[0][:, 1])
    assert torch.equal(seen[0], seen[1])
    assert (seen[0][..., 1:] > seen[0][..., :-1]).all()  # the ramp still climbs from left to right


# --- an average of weights that moves once per micro-step ------------------------------------------------------------


def stub_job(net: nn.Module, weights: Weights, micro: int, accumulate: int) -> Any:
    """What one step of the offline loop reads, over twelve pairs."""
    pairs = linear.data(12)

    class Data:
        groups = (0,) * 12

        def __len__(self) -> int:
            return 12

        def batch(self, indices, generator, labels):
            return pairs.rows(torch.tensor(indices))

    run = SimpleNamespace(
        world=1, rank=0, rollbacks=0, autocast=torch.enable_grad, kernels=lambda positions: nullcontext(),
        mean_over_ranks=torch.mean, sum_over_ranks=lambda x: x, device=torch.device("cpu"), folder=Path(),
    )  # fmt: skip
    net.device = torch.device("cpu")
    settings = SimpleNamespace(accumulate=accumulate, batch=micro, seed=0, ema=0.9, ema_every=1)
    update = linear.make_update(net, lambda t: t)
    config = SimpleNamespace(run=settings, data=SimpleNamespace(bank=None))
    core = SimpleNamespace(
        config=config, method=linear.METHOD, family=net, weights=weights, run=run, update=update, tally=None
    )
    return SimpleNamespace(core=core, labels=("reward",), data=Data(), bank=None)


@pytest.mark.parametrize("accumulate", [1, 3, 12])
def test_the_average_moves_once_per_update_whatever_the_accumulation(accumulate, monkeypatch):
    """Flow-GRPO's trainer steps its average once per micro-batch, so that accumulation changes what is evaluated."""
    net = linear.network()
    start = [p.detach().clone() for p in net.parameters()]
    weights = Weights(net, lora=False, copies=["average"])
    monkeypatch.setattr(weights, "use", lambda role: net, raising=False)
    job = stub_job(net, weights, 12 // accumulate, accumulate)
    monkeypatch.setattr(offline, "check_start", lambda *_: None)  # this network's reference is another one
    expected = start
    for step, micros in zip(range(3), offline._schedule(job, 0), strict=False):
        offline._step(job, step, micros)
        expected = [0.9 * a + 0.1 * p.detach() for a, p in zip(expected, net.parameters(), strict=True)]
    torch.testing.assert_close(weights.copies["average"], expected, rtol=1e-12, atol=0)
    assert not any(map(torch.equal, start, expected))
    assert job.core.update.optimizer.state_dict()["param_groups"][0]["lr"] == pytest.approx(0.2 / 4)  # three updates


# --- the mean inside the logarithm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "dpop", "robust", "dense", "exo_pair", "clipped_ratio", "contrastive"])
def test_the_mean_is_outside_the_logarithm(name):
    """Early scripts took ``-log sigmoid(mean margin)``: easy pairs then hide the gradient of hard ones."""
    lead = torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64)
    policy = torch.stack([lead, 0 * lead], 1)[..., None] * 0.03 - 1
    lp = LogProbs({"policy": policy, "reference": 0 * policy - 1}, torch.ones(3, 2, 1))
    labels = {"reward": torch.tensor([[1.0, 0.0]]).expand(3, 2)}
    params = {"beta": 30.0, **({"flip_rate": 0.1} if name == "robust" else {})}
    loss = find_objective(name)(lp, labels, **params)[0]
    alone = [
        find_objective(name)(
            LogProbs({role: v[i : i + 1] for role, v in lp.by_role.items()}, lp.mask[:1]),
            {"reward": labels["reward"][:1]},
            **params,
        )[0].reduce()
        for i in range(3)
    ]
    assert loss.reduce().item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-12)
    if name == "sigmoid":
        margins = 30 * 0.03 * lead
        assert loss.reduce().item() == pytest.approx(torch.log1p((-margins).exp()).mean().item(), rel=1e-12)
        assert loss.reduce().item() > torch.log1p((-margins.mean()).exp()).item() + 0.1


# --- label smoothing that is accepted and ignored --------------------------------------------------------------------

SMOOTHED = {
    name: key
    for name in sorted(OBJECTIVES)
    for key in ("label_smoothing", "smoothing", "flip_rate")
    if key in keyword_parameters(OBJECTIVES[name].fn)
}


@pytest.mark.parametrize("name", SMOOTHED)
def test_label_smoothing_acts_wherever_it_is_accepted(name):
    """TRL takes it for the sigmoid loss and does nothing with it."""
    strength = {"beta": 0.5} if "beta" in keyword_parameters(OBJECTIVES[name].fn) else {}
    little, much = (
        registry_cases.evaluate(registry_cases.example(name, **strength, **{SMOOTHED[name]: value}))
        for value in (0.01, 0.3)
    )
    assert (little.total - much.total).abs() > 1e-3
    assert (little.gradients["policy"] - much.gradients["policy"]).abs().max() > 1e-3


def test_the_registry_still_has_objectives_with_label_smoothing():
    assert {"sigmoid", "contrastive", "simpo", "tpo", "exo_pair", "robust", "condition"} <= set(SMOOTHED)
