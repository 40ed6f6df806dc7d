"""Every row of the catalogue takes real steps: its own draw, estimate, shaping and objective on a tiny network.

Networks are in float64 and carry a LoRA that starts at zero, so that the policy is the reference and the behaviour.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from diffalign.dataset import check_records
from diffalign.errors import UserError
from diffalign.methods import needs, resolve
from diffalign.records import Candidate, Record
from diffalign.registry import find_objective
from diffalign.train.step import StepResult
from diffalign.types import Method
from diffalign.weights import Weights

from . import tiny_text
from .kits import CASES, DDIM, DISCRETE, FLOW, GRADIENTS, PATHS, Kit, diffusion_kit, text_kit


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A fresh kit by row and schedule, None for text."""
    folder = cache(lambda: tiny_text.llama(tmp_path_factory.mktemp("llama")))
    return lambda name, schedule: text_kit(name, folder()) if schedule is None else diffusion_kit(name, schedule)


every_row = pytest.mark.parametrize(
    ("name", "schedule"), CASES, ids=[f"{n}-{type(s).__name__.lower()}" if s else n for n, s in CASES]
)


# --- values at policy = reference = behaviour -------------------------------------------------------------------------


def pair_of(kit: Kit, value: Tensor) -> tuple[Tensor, Tensor]:
    """A value (B, 2) of the winners and of the losers."""
    order = kit.batch.labels["reward"].argsort(1, descending=True)
    return value.gather(1, order).unbind(1)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(x.exp())


def gain_weights(kit: Kit, lp) -> Tensor:
    """RankDPO's weights times ln 2, summed over the pairs of a list."""
    reward = kit.batch.labels["reward"].double()
    rank = reward.argsort(1, descending=True).argsort(1) + 1
    gain, discount = 2**reward - 1, (1 + rank).log()
    each = (gain[:, :, None] - gain[:, None]).abs() * (1 / discount[:, :, None] - 1 / discount[:, None]).abs()
    return each.sum((1, 2)) / 2 * math.log(2)


def orpo_of_errors(kit: Kit, lp) -> Tensor:
    won, lost = pair_of(kit, -lp.mean())
    return won + 0.1 * softplus(won - lost)


def mapo_of_errors(kit: Kit, lp) -> Tensor:
    won, lost = pair_of(kit, -lp.mean())
    f_won, f_lost = (0.5 * e / ((0.5 * e).exp() - 1) for e in (won, lost))
    return won - 0.1 * torch.sigmoid(1000 * (f_won - f_lost)).clamp_min(1e-300).log()


def condition_of_errors(kit: Kit, lp) -> Tensor:
    won, lost = pair_of(kit, -2 * lp.mean())
    return 0.5 * (0.9 * (won - lost + 0.01).clamp_min(0) + 0.1 * (0.01 - won + lost).clamp_min(0))


def simpo_of_means(kit: Kit, lp) -> Tensor:
    won, lost = pair_of(kit, lp.mean())
    return softplus(-2.0 * (won - lost - 0.25))


def orpo_of_means(kit: Kit, lp) -> Tensor:
    won, lost = pair_of(kit, lp.mean())
    odds = [p - torch.log1p(-p.exp()) for p in (won, lost)]
    return -won + 0.1 * softplus(odds[1] - odds[0])


def madpo_of_scores(kit: Kit, lp) -> Tensor:
    won, lost = pair_of(kit, kit.batch.labels["score"].double())
    offset = math.log((2 - 1) / (1 - 0.5))
    c = 0.5 + 1.5 * torch.sigmoid(-((won - lost).abs() - math.log(999)) - offset)
    return torch.sigmoid(c * (won - lost)) / torch.sigmoid(won - lost) * math.log(2)


def minus_gain(kit: Kit, lp) -> Tensor:
    return -kit.batch.labels["advantage"].double()


KNOWN = {
    **{name: [minus_gain] for name in GRADIENTS},
    "awm-released": [lambda kit, lp: minus_gain(kit, lp) / 5],
    "grpo-guard": [lambda kit, lp: (minus_gain(kit, lp)[..., None] / lp.extra["dt"]).mean(-1)],
    "diffusion-kto": [0.5],
    "text-kto": [0.5],
    "text-ipo": [25.0],
    "ddo": [math.log(2), 4 * math.log(2)],
    "diffusion-dro": [1e-3],
    "rank-dpo": [gain_weights],
    "diffusion-orpo": [orpo_of_errors],
    "mapo": [mapo_of_errors],
    "condition-po": [condition_of_errors],
    "dso-dro": [lambda kit, lp: -(2 * kit.batch.labels["desirable"] - 1) * lp.mean()],
    "text-simpo": [simpo_of_means],
    "text-orpo": [orpo_of_means],
    "text-madpo": [madpo_of_scores],
    "text-sppo": [(1000 * 0.2) ** 2],
    "text-dro-v": [lambda kit, lp: kit.batch.labels["reward"].double() ** 2 / 2] * 2,
    "text-oreo": [lambda kit, lp: kit.batch.labels["reward"].double() ** 2] * 2,
}
"""Values of the main term's parts there, by hand: a number, or one per record or candidate to be averaged."""


@every_row
def test_values_where_nothing_is_learned_yet(make, name, schedule):
    """The registered identity, or what the paper's formula gives; penalties that compare two networks are 0."""
    kit = make(name, schedule)
    result = kit.step()
    lp = result.log_probs
    for role in set(lp.by_role) - {"guide"}:
        assert (lp.by_role[role] - lp.by_role["policy"]).abs().max() <= 1e-12
    identity = find_objective(kit.method.main.objective).identity
    expected = KNOWN.get(name, [identity])
    assert (identity is None) == (name in KNOWN or name == "diffusion-nft")
    found = [(term.total / term.weight).item() for term in result.terms]
    if name == "diffusion-nft":  # both branches are one, so the reward means nothing but for the gradient
        other = replace(kit, batch=replace(kit.batch, labels={"advantage": -kit.batch.labels["advantage"]})).step()
        assert found[0] == pytest.approx(other.terms[0].total.item() / other.terms[0].weight.item(), rel=1e-12)
        expected = found[:1]
    values = [value if isinstance(value, float) else value(kit, lp).mean().item() for value in expected]
    assert found[: len(values)] == pytest.approx(values, rel=1e-6)
    if name == "condition-po":
        assert found[1] > 0  # imitation, with its own draw
    else:
        assert found[len(values) :] == pytest.approx([0.0] * (len(found) - len(values)), abs=1e-20)
    assert result.loss.item() == pytest.approx(sum(t.factor * f for t, f in zip(result.terms, found, strict=True)))


@every_row
def test_only_what_trains_gets_gradients(make, name, schedule):
    kit = make(name, schedule)
    kit.step().loss.backward()
    for part, parameter in kit.weights.net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in part or "value_head" in part)
        if "lora_A" not in part and parameter.grad is not None:  # A's are zero while B is
            assert parameter.grad.any(), part
    for net in kit.weights.others.values():
        assert all(parameter.grad is None for parameter in net.parameters())


def slide(kit: Kit, method: Method, size: float = 1e-3, steps: int = 5) -> list[StepResult]:
    """Plain gradient steps of one length on one batch and draw, and what came before each and after all."""
    found = []
    for _ in range(steps):
        found.append(kit.step(method))
        gradients = torch.autograd.grad(found[-1].loss, kit.weights.trainable())
        length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        with torch.no_grad():
            for parameter, g in zip(kit.weights.trainable(), gradients, strict=True):
                parameter -= size * g / length
    return [*found, kit.step(method)]


@every_row
def test_steps_downhill_lower_the_loss(make, name, schedule):
    """All rows but AWM's, whose value on policy is minus the advantage whatever the weights: its score must rise.

    ``dso-dro`` goes down too, but without end: it has no minimum to speak of.
    """
    kit = make(name, schedule)
    results = slide(kit, kit.fixed())
    if kit.method.main.objective == "advantage_weighted":
        gain = kit.batch.labels["advantage"].double()
        heights = [-(gain * result.log_probs.mean()).mean().item() for result in results]
        assert results[-1].terms[0].total.item() == pytest.approx(results[0].terms[0].total.item(), rel=1e-12)
    else:
        heights = [result.loss.item() for result in results]
    assert heights[0] > heights[1] > heights[-1]


# --- what is missing --------------------------------------------------------------------------------------------------


def refused(kit: Kit, match: str, **changes) -> None:
    with pytest.raises(UserError, match=match) as caught:
        replace(kit, batch=replace(kit.batch, **changes)).step()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_trajectories_must_be_there(make, name):
    refused(make(name, DISCRETE if name in DDIM else FLOW), "reads sampling trajectories", path=None)


@every_row
def test_labels_must_be_there_in_their_shape(make, name, schedule):
    kit = make(name, schedule)
    for label, value in kit.batch.labels.items():
        others = {key: held for key, held in kit.batch.labels.items() if key != label}
        refused(kit, f"reads the label '{label}'", labels=others)
        refused(kit, f"label '{label}'", labels={**others, label: torch.cat([value, value], 1)})
        if label != "ids":
            many = value.reshape(*value.shape[:2], -1)[..., :1].expand(-1, -1, 99)
            refused(kit, f"label '{label}'", labels={**others, label: many})


def test_a_list_is_no_pair(make):
    kit = make("rank-dpo", FLOW)
    kit.method = resolve("diffusion-dpo")
    refused(kit, "'sigmoid' needs exactly 2 candidates per record, the batch has 3")


def test_an_optional_label_is_given_to_all_or_none():
    """One that only some have would be dropped or end in a traceback, by what the first record happens to have."""
    given, bare = {"reward": 1.0, "segment": [0.0, 1.0]}, {"reward": 0.0}
    for order in ([given, bare], [bare, given]):
        candidates = [Candidate(sample="a.png", labels=dict(labels)) for labels in order]
        with pytest.raises(UserError, match="a candidate without the label 'segment'"):
            check_records([Record(id="r", prompt="p", candidates=candidates)], resolve("dense-dpo"), "here")


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("diffusion-nft", FLOW, "no weights play the role 'behaviour'"),
        ("awm-released", FLOW, r"set run\.ema"),
        ("text-tgdpo", None, r"give a folder as model\.others\.guide"),
    ],
)
def test_roles_must_be_played(make, name, schedule, message):
    kit = make(name, schedule)
    with pytest.raises(UserError, match=message):
        Weights(kit.weights.net, lora=True).prepare(needs(*kit.method.terms).roles)


def test_parts_that_do_not_fit_the_model_or_the_data(make):
    kit = make("diffusion-nft", FLOW)
    kit.family.schedule = DISCRETE
    refused(kit, "'branches' reads velocities of a flow")
    kit = make("d3po", DISCRETE)
    kit.family.schedule = FLOW
    refused(kit, "transition 'ddim' does not fit the schedule")
    kit = make("flow-grpo", FLOW)
    kit.method = resolve("flow-grpo", draw={"fraction": 0.1})
    refused(kit, "0.1 of a trajectory of 6 steps leaves none")
    kit = make("text-kto", None)
    with pytest.raises(UserError, match=r"run\.batch to 2 or more"):
        replace(kit, batch=kit.batch.rows(slice(0, 1))).step()
