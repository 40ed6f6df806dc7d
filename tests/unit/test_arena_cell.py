"""What an arena does to records and how it measures a model."""

import pytest
import torch

from diffalign.arena.judge import diversity
from diffalign.arena.pool import exchanged
from diffalign.held_out import weighted
from diffalign.records import Candidate, Record
from diffalign.train.tally import Tally


def record(*rewards):
    return Record(
        id="a", prompt="p", candidates=[Candidate(text=str(n), labels={"reward": r}) for n, r in enumerate(rewards)]
    )


@pytest.mark.parametrize(
    ("rewards", "wanted"), [((1.0, 0.0), [0.0, 1.0]), ((0.2, 0.9, 0.5), [0.9, 0.2, 0.5]), ((0.3,), [0.3])]
)
def test_best_and_worst_change_places(rewards, wanted):
    assert [c.labels["reward"] for c in exchanged(record(*rewards)).candidates] == wanted


def test_diversity_compares_pictures_of_one_prompt_alone():
    samples = torch.zeros(4, 3, 2, 2)
    samples[1] = 1.0
    samples[3] = 0.5
    prompts = [Record(id=str(n), prompt=prompt) for n, prompt in enumerate("aabb")]
    assert diversity(samples, prompts) == pytest.approx((1.0 + 0.5) / 2)
    assert diversity(samples[::2], prompts[::2]) == 0.0


def test_labels_are_summed_by_weight():
    one = {"t": {"p": [1.0, 2.0]}}
    other = {"t": {"p": [10.0, 20.0]}}
    assert weighted({"a": one, "b": other}, {"a": 2.0, "b": 0.5}) == {"t": {"p": [7.0, 14.0]}}


def test_a_forward_counts_one_and_a_differentiated_one_three():
    class Family:
        def predict(self, net, x_t, t, cond):
            return net(x_t)

    family, net = Family(), torch.nn.Linear(2, 2)
    tally = Tally(family)
    x = torch.zeros(5, 2)
    family.predict(net, x, torch.zeros(5), {})
    with torch.no_grad():
        family.predict(net, x, torch.zeros(5), {})
    net.requires_grad_(False)
    family.predict(net, x[:2], torch.zeros(2), {})
    assert tally.take() == 15 + 5 + 2
    assert tally.take() == 0
