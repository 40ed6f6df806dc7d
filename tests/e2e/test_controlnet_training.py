"""ControlNets trained through the command line: LoRA, full weights, Condition PO; then stock code reads the result."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign import records as store
from diffalign.config import TrainConfig
from diffalign.config.file import load as read_config
from diffalign.dataset import Dataset
from diffalign.encoding import Cut
from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.methods import METHODS
from diffalign.networks import Loading
from diffalign.predict import predict
from diffalign.train.step import loss_step
from diffalign.types import Sampling
from diffalign.weights import Weights

from . import tiny_control
from .stock import assert_resumes_exactly, losses
from .tiny_control import KINDS, SIZE, call, load, requests, stock_pipe

FULL = "controlnet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Read only."""
    return tiny_control.write(tmp_path_factory.mktemp("control"), KINDS)


@pytest.fixture
def conditioned(own_pairs) -> Path:
    """The pairs with a condition image for every record: the sample of another one."""
    rows = list(store.read(own_pairs))
    names = [str(row.candidates[0].sample) for row in rows]
    changed = [
        row.model_copy(update={"condition": name}) for row, name in zip(rows, names[1:] + names[:1], strict=True)
    ]
    store.write(own_pairs, changed)
    return own_pairs


@pytest.fixture
def two_conditions(own_pairs) -> Path:
    """One sample twice in every record, the better one under its own picture, the worse under another."""
    rows = [
        row.model_copy(
            update={
                "candidates": [
                    store.Candidate(sample=row.candidates[0].sample, condition=c.sample, labels={"reward": 1.0 - k})
                    for k, c in enumerate(row.candidates)
                ]
            }
        )
        for row in store.read(own_pairs)
    ]
    store.write(own_pairs, rows)
    return own_pairs


def train_config(config, folder: Path, **changes: Any) -> Path:
    made = {
        "model": {"family": "controlnet", "path": str(folder)},
        "data": {"size": [32, 32]},
        "optim": {"lr": 0.03},
        "run": {"steps": 3, "batch": 2, "save_every": 1},
    }
    return config("train", {**made, **changes})


def export(cli, folder: Path, form: str, model: dict[str, Any]) -> None:
    """The run in ``folder``, into a folder beside it."""
    path, out = folder / "export.yaml", {"weights": str(folder / "run"), "out": str(folder / form), "format": form}
    path.write_text(json.dumps({**out, "model": {"family": "controlnet", "device": "cpu", **model}}))
    outcome = cli("export", path)
    assert outcome.code == 0, outcome.err


@pytest.mark.usefixtures("conditioned")
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_a_lora_trains_resumes_and_loads_in_stock_code(cli, config, folders, kind, tmp_path):
    path = train_config(config, folders[kind])
    outcome = cli("train", path)
    assert outcome.code == 0, outcome.err
    rows = losses(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["gap"] > 0
    assert_resumes_exactly(cli, path, tmp_path / "run")

    pipe, family = stock_pipe(folders, kind), load(folders, kind)
    before = call(pipe, family, 3, 1.0)
    pipe.controlnet.load_lora_adapter(tmp_path / "run/lora", prefix=None, use_safetensors=True)
    after = call(pipe, family, 3, 1.0)
    sampler = "euler" if kind == "flux" else "ddim"
    adapted = load(folders, kind, tmp_path / "run/lora")
    sampled = sample_media(adapted, requests(), Sampling(sampler, 3, 1.0, SIZE))
    assert (after - before).abs().max() > 1e-3, "the adapter must matter, or this test shows nothing"
    assert (after - sampled).abs().max() < 1e-3

    for form in ("lora", "peft", "diffusers"):
        export(cli, tmp_path, form, {"path": str(folders[kind])})
    merged = call(stock_pipe({kind: tmp_path / "diffusers"}, kind), family, 3, 1.0)
    assert (merged - after).abs().max() < 1e-3


@pytest.mark.usefixtures("conditioned")
@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixels"])
def test_full_weights_train_resume_and_are_read_by_the_stock_pipeline(cli, config, folders, kind, tmp_path):
    path = train_config(config, folders[kind], model={"family": "controlnet", "path": str(folders[kind]), "lora": None})
    outcome = cli("train", path, "optim.lr=0.003")
    assert outcome.code == 0, outcome.err
    rows = losses(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["gap"] > 0

    def again(*words: object) -> Any:
        return cli(*words, "optim.lr=0.003")

    assert_resumes_exactly(again, path, tmp_path / "run", weights=FULL)
    start = load_file(folders[kind] / FULL)
    assert any(not torch.equal(value, start[name]) for name, value in load_file(tmp_path / "run" / FULL).items())

    pipe = stock_pipe(folders, kind)
    trained = type(pipe.controlnet).from_pretrained(tmp_path / "run/controlnet")
    pipe.register_modules(controlnet=trained)
    place, parts = folders[kind] / "base", {"controlnet": str(tmp_path / "run/controlnet")}
    family = load_family("controlnet", str(place), "cpu", loading=Loading(parts=parts))
    ours = sample_media(family, requests(), Sampling("euler" if kind == "pixels" else "ddim", 3, 1.0, SIZE))
    theirs = call(pipe, family, 3, 1.0)
    assert (ours - theirs).abs().max() < 1e-3
    export(cli, tmp_path, "diffusers", {"path": str(place), "parts": {"controlnet": str(folders[kind] / "controlnet")}})
    exported = stock_pipe({kind: tmp_path / "diffusers"}, kind)
    assert (call(exported, family, 3, 1.0) - theirs).abs().max() < 1e-5


def test_condition_po_learns_from_two_conditions_on_one_sample(cli, config, folders, two_conditions, tmp_path):
    method = {"name": "condition-po", "objective": {"beta": 5000.0}}
    model = {"family": "controlnet", "path": str(folders["sd"]), "lora": None}
    path = train_config(config, folders["sd"], model=model, method=method)
    outcome = cli("train", path, "optim.lr=0.001", "run.ema=0.9")
    assert outcome.code == 0, outcome.err
    rows = losses(tmp_path / "run")
    assert len(rows) == 3
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["gap"] > 0
    assert (tmp_path / "run" / FULL).is_file()


def test_condition_po_noises_one_latent_and_imitates_under_the_better_condition(folders, two_conditions, tmp_path):
    """The pair shares latent, noise and time; the pre-training loss has a draw of its own and one of the conditions."""
    family, method = load(folders, "sd"), METHODS["condition-po"]
    rows = list(store.read(two_conditions))[:4]
    data = Dataset(rows, two_conditions.parent, family, tmp_path / "cache", Cut((32, 32)))
    batch = data.batch(range(4), torch.Generator().manual_seed(0), ("reward",))
    weights = Weights(family.net, lora=False)
    weights.prepare(("reference",))
    [imitation] = method.extra
    assert method.main.draw is not None
    assert imitation.draw is not None

    def losses_of(control: Tensor) -> list[Tensor]:
        changed = replace(batch, cond={**batch.cond, "control": control})
        result = loss_step(method, family, weights, changed, torch.Generator().manual_seed(1))
        return [term.total / term.weight for term in result.terms]

    generator = torch.Generator().manual_seed(1)
    pair, alone = (draw(family, weights, batch, generator) for draw in (method.main.draw, imitation.draw))
    assert torch.equal(pair.x_t[:, 0], pair.x_t[:, 1])
    assert torch.equal(pair.target[:, 0], pair.target[:, 1])
    assert not torch.equal(pair.t, alone.t)
    control = batch.cond["control"]
    better = {name: value[:, 0] for name, value in batch.cond.items()}
    predicted = family.predict(family.net, alone.x_t[:, 0], alone.t[:, 0], better)
    contrast, mse = losses_of(control)
    torch.testing.assert_close(mse, (predicted - alone.target[:, 0]).square().mean())
    other = losses_of(torch.stack([control[:, 0], control[:, 1].flip(-1)], 1))
    assert torch.equal(other[1], mse)
    assert other[0] != contrast
    assert losses_of(torch.stack([control[:, 0].flip(-1), control[:, 1]], 1))[1] != mse


def test_a_run_is_predicted_for_both_networks(config, folders, conditioned, tmp_path):
    rows, base = list(store.read(conditioned)), str(folders["sd"] / "base")
    models = (
        {"family": "controlnet", "path": str(folders["sd"])},
        {"family": "controlnet", "path": base, "parts": {"controlnet": str(folders["sd"] / "controlnet")}},
        {"family": "sd", "path": base},
    )
    paths = [
        train_config(config, folders["sd"], model=model).rename(tmp_path / f"{i}.yaml")
        for i, model in enumerate(models)
    ]
    whole, parts, alone = (predict(read_config(TrainConfig, str(p)), METHODS["diffusion-dpo"], rows) for p in paths)
    assert whole == parts
    assert whole.total - whole.trained == sum(p.numel() for p in load(folders, "sd").net.parameters())
    assert whole.forward.flops > 1.2 * alone.forward.flops


def test_generate_copies_the_condition_image(cli, config, folders, conditioned, tmp_path):
    changes = {
        "model": {"family": "controlnet", "path": str(folders["sd"])},
        "prompts": {"source": str(conditioned), "limit": 2},
        "sampling": {"sampler": "ddim", "guidance": 3.0},
    }
    outcome = cli("generate", config("generate", changes))
    assert outcome.code == 0, outcome.err
    made = list(store.read(tmp_path / "pool/records.jsonl"))
    given = list(store.read(conditioned))
    assert len(made) == 2
    for mine, source in zip(made, given, strict=False):
        assert mine.condition == f"media/condition-{mine.id}.png"
        copied, original = (tmp_path / "pool" / mine.condition), conditioned.parent / str(source.condition)
        assert copied.read_bytes() == original.read_bytes()
        assert len(mine.candidates) == 2
