"""Errors of the reference that are known already: the same run without its forwards."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from diffalign.bank import Bank, check_method
from diffalign.dataset import Visit
from diffalign.encoding import open_checked
from diffalign.errors import UserError
from diffalign.methods import resolve
from diffalign.weights import Weights

SETTINGS = {"run": {"steps": 16, "batch": 4}}  # four passes over the sixteen pairs


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def train(cli, config, tmp_path, monkeypatch):
    """Runs a config and counts the forwards of every role."""
    played: Counter[str] = Counter()
    use = Weights.use
    monkeypatch.setattr(Weights, "use", lambda self, role: (played.update([role]), use(self, role))[1])

    def run(name: str, *words: str, changes: dict | None = None) -> tuple[list[float], Counter]:
        played.clear()
        outcome = cli("train", config("train", {**SETTINGS, **(changes or {})}), f"run.dir={tmp_path / name}", *words)
        assert outcome.code == 0, outcome.err
        return losses(tmp_path / name), Counter(played)

    return run


def test_two_passes_are_as_without_and_later_ones_run_no_reference(train, own_pairs):
    plain, forwards = train("plain")
    assert forwards["reference"] == 16
    kept, forwards = train("kept", "data.bank=2")
    assert forwards["reference"] == 8
    assert kept[:8] == plain[:8]
    assert kept[8:] != plain[8:]  # the third pass sees the draws of the first
    (file,) = (own_pairs.parent / "cache").glob("bank-*.safetensors")
    errors = open_checked(file).get_tensor("errors")
    assert errors.shape == (16, 2, 2, 1)
    assert errors.isfinite().all()
    again, forwards = train("again", "data.bank=2")
    assert forwards["reference"] == 0
    assert again == pytest.approx(kept, abs=1e-6)


def test_another_beta_method_or_kind_of_training_shares_them(train):
    train("first", "data.bank=2", "run.steps=8")
    for name, words, changes in (
        ("beta", ["method.objective.beta=50"], None),
        ("hinge", ["method.objective.name=hinge"], None),
        ("scale", ["method.estimate.scale=1.0"], None),
        ("full", ["model.lora=null"], None),
    ):
        found, forwards = train(name, "data.bank=2", *words, changes=changes)
        assert forwards["reference"] == 0, name
        assert len(set(found)) > 8


def test_what_changes_the_errors_changes_the_file(train, own_pairs):
    train("first", "data.bank=2", "run.steps=4")
    for number, words in enumerate(
        (["run.seed=1"], ["data.bank=3"], ["run.precision=bf16"], ["method.draw.share_noise=false"]), 2
    ):
        _, forwards = train(f"run{number}", "data.bank=2", "run.steps=1", *words)
        assert forwards["reference"] == 1, words
        assert len(list((own_pairs.parent / "cache").glob("bank-*"))) == number


def test_a_changed_model_never_meets_old_errors(cli, config, own_sd3, own_pairs, tmp_path):
    from diffalign.families.base import load_family

    path = config("train", {"model": {"path": str(own_sd3)}, "data": {"bank": 2}})
    assert cli("train", path).code == 0
    net = load_family("sd3", str(own_sd3), "cpu").net
    with torch.no_grad():
        net.proj_out.bias.add_(0.1)
    net.save_pretrained(own_sd3 / "transformer")
    assert cli("train", path, f"run.dir={tmp_path / 'other'}").code == 0
    assert losses(tmp_path / "other")[0] == pytest.approx(0.693147, abs=1e-6)
    assert len(list((own_pairs.parent / "cache").glob("bank-*"))) == 2


def test_a_damaged_file_is_computed_again(train, own_pairs):
    train("first", "data.bank=1", "run.steps=4")
    (file,) = (own_pairs.parent / "cache").glob("bank-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert train("again", "data.bank=1", "run.steps=4")[1]["reference"] == 4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("smpo", "draws that can be repeated"),
        ("awm", "reads reference, gap.reference"),
        ("mapo", "reads no reference"),
        ("diffusion-nft", "draws that can be repeated"),
    ],
)
def test_methods_that_run_the_reference_every_time_are_refused(name, why):
    with pytest.raises(UserError, match=f"data.bank: .*{why}"):
        check_method(resolve(name))


def test_two_writers_lose_at_most_what_they_found_at_the_same_moment(tmp_path):
    first, second = (Bank(tmp_path / "bank.safetensors", 3, 2) for _ in range(2))
    first.put([Visit(0, 0), Visit(1, 3)], torch.tensor([[[1.0]], [[2.0]]]))
    second.put([Visit(2, 0)], torch.tensor([[[3.0]]]))
    for bank in (first, second):
        bank.save(lambda value: value, write=True)
    stored = Bank(tmp_path / "bank.safetensors", 3, 2)
    found = stored.known([Visit(0, 2), Visit(1, 1), Visit(2, 0)])
    assert found is not None
    assert found.flatten().tolist() == [1.0, 2.0, 3.0]
    assert stored.known([Visit(0, 1)]) is None
