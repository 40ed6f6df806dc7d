"""A row's random numbers are its own, whoever draws them."""

import pytest
import torch

from diffalign.randomness import device_of, keyed, rand, randn

CPU = torch.device("cpu")


def rows(*numbers: int) -> list[torch.Generator]:
    return [keyed(CPU, 0, number) for number in numbers]


def test_a_row_does_not_depend_on_its_neighbours():
    for draw in (rand, randn):
        together = draw((3, 2, 4), rows(0, 1, 2))
        assert torch.equal(together[1:2], draw((1, 2, 4), rows(1)))
        assert torch.equal(together[[2, 0]], draw((2, 2, 4), rows(2, 0)))
        assert len(together.unique()) == together.numel()


def test_one_generator_serves_a_whole_batch():
    expected = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(randn((3, 4), torch.Generator().manual_seed(5)), expected)
    assert device_of(rows(0)) == device_of(torch.Generator()) == CPU


def test_every_number_of_a_key_counts():
    keys = [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 1), (0, 1, 3)]
    assert len({float(rand((1,), keyed(CPU, *key))) for key in keys}) == len(keys)
    assert torch.equal(rand((4,), keyed(CPU, 3, 1)), rand((4,), keyed(CPU, 3, 1)))


def test_generators_and_rows_are_as_many():
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        randn((3, 4), rows(0, 1))
