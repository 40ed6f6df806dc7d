"""Roles of one network: LoRA off and on, frozen copy, moving average, and the way back from each."""

import copy

import pytest
import torch

from diffalign.errors import UserError
from diffalign.weights import Weights

from . import tiny

KINDS = ["lora", "full"]


def make(kind: str, *copies: str) -> Weights:
    net = tiny.with_lora() if kind == "lora" else tiny.transformer()
    weights = Weights(net, lora=kind == "lora", copies=copies)
    weights.prepare(("reference",))
    return weights


def train(weights: Weights, steps: int = 3) -> None:
    """A few real steps that lower the output's size."""
    optimizer = torch.optim.AdamW(weights.trainable(), lr=0.05)
    for _ in range(steps):
        with weights.use("policy") as net:
            tiny.forward(net).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def output(weights: Weights, role: str) -> torch.Tensor:
    with torch.no_grad(), weights.use(role) as net:
        return tiny.forward(net)


def values(weights: Weights) -> list[torch.Tensor]:
    return [p.detach().clone() for p in weights.trainable()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_the_base_to_the_bit(kind):
    weights = make(kind)
    with weights.use("policy") as net:
        base = tiny.forward(net).detach()  # as in training: the policy with graph, the reference without
    assert torch.equal(output(weights, "reference"), base)
    train(weights)
    assert torch.equal(output(weights, "reference"), base)
    assert (output(weights, "policy") - base).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains(kind):
    weights = make(kind)
    names = {name for name, p in weights.net.named_parameters() if p.requires_grad}
    everything = {name for name, _ in weights.net.named_parameters()}
    assert names == ({n for n in everything if "lora_" in n} if kind == "lora" else everything)
    assert len(names) == len(weights.trainable())


def test_a_full_reference_is_a_copy_that_no_optimiser_sees():
    weights = make("full")
    with weights.use("reference") as reference:
        assert reference is not weights.net
        assert {p.data_ptr() for p in reference.parameters()}.isdisjoint(p.data_ptr() for p in weights.trainable())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["reference", "average"])
def test_a_failure_inside_a_role_leaves_the_policy_as_it_was(kind, role):
    weights = make(kind, "average")
    train(weights)
    before, trainable, result = values(weights), len(weights.trainable()), output(weights, "policy")

    def fail() -> None:
        with weights.use(role):
            assert not torch.equal(output(weights, "policy"), result) or kind == "full"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert len(weights.trainable()) == trainable
    assert same(values(weights), before)
    assert torch.equal(output(weights, "policy"), result)
    train(weights, 1)
    assert not same(values(weights), before)


def test_a_forward_of_the_reference_does_not_disturb_a_pending_backward():
    def gradients(interrupt: bool) -> list[torch.Tensor]:
        weights = make("lora")
        train(weights)
        loss = tiny.forward(weights.net).square().mean()
        if interrupt:
            output(weights, "reference")
        loss.backward()
        return [p.grad for p in weights.trainable()]

    assert same(gradients(True), gradients(False))


# --- moving average -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_the_recursion(kind):
    weights = make(kind, "average")
    expected = values(weights)
    for _ in range(3):
        train(weights, 1)
        weights.refresh("average", 0.9)
        expected = [0.9 * a + 0.1 * p for a, p in zip(expected, values(weights), strict=True)]
    for found, wanted in zip(weights.copies["average"], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert not same(weights.copies["average"], values(weights))


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_swapped_in_and_out(kind):
    weights = make(kind, "average")
    initial = output(weights, "policy")
    train(weights)
    trained, before = output(weights, "policy"), values(weights)
    assert torch.equal(output(weights, "average"), initial)  # no update yet
    with weights.use("average"):
        assert same(values(weights), weights.copies["average"])
    assert same(values(weights), before)
    assert torch.equal(output(weights, "policy"), trained)


def test_an_average_at_decay_zero_is_the_policy_and_holds_no_alias():
    weights = make("lora", "average")
    train(weights)
    weights.refresh("average", 0.0)
    assert same(weights.copies["average"], values(weights))
    train(weights, 1)
    assert not same(weights.copies["average"], values(weights))


# --- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [(), ("average",), ("behaviour", "reference")])
def test_a_state_loads_back(kind, copies):
    weights = make(kind, *copies)
    train(weights)
    for role in copies:
        weights.refresh(role, 0.9)
    state = copy.deepcopy(weights.state_dict())
    fresh = make(kind, *copies)
    fresh.load_state_dict(state)
    assert torch.equal(output(fresh, "policy"), output(weights, "policy"))
    assert torch.equal(output(fresh, "reference"), output(weights, "reference"))
    assert state.keys() == fresh.state_dict().keys()
    for role in copies:
        assert same(fresh.copies[role], weights.copies[role])
        assert not same(fresh.copies[role], values(fresh))


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (lambda: make("lora"), lambda: make("full")),
        (lambda: make("full"), lambda: make("lora")),
        (lambda: make("lora", "average"), lambda: make("lora")),
        (lambda: make("lora"), lambda: make("lora", "average")),
    ],
    ids=["full in lora", "lora in full", "no average", "an average too many"],
)
def test_a_foreign_state_is_refused_and_changes_nothing(mine, theirs):
    weights = mine()
    before = values(weights)
    with pytest.raises(UserError, match="other trained parameters"):
        weights.load_state_dict(theirs().state_dict())
    assert same(values(weights), before)


def test_a_lora_of_another_rank_is_refused():
    weights = make("lora")
    state = {name: torch.zeros(3, 3) for name in weights.state_dict()}
    with pytest.raises(UserError, match="other trained parameters"):
        weights.load_state_dict(state)


def test_roles_that_nobody_plays():
    weights = make("lora")
    with pytest.raises(UserError, match=r"'behaviour': give a folder as model\.others\.behaviour"):
        weights.prepare(("behaviour",))
    full = Weights(tiny.transformer(), lora=False)
    for role in ("reference", "average", "referense"):
        with pytest.raises(RuntimeError, match="not prepared"), full.use(role):
            pass
