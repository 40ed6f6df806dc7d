"""`diffalign train` on two processes is the run of one process with the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = (
    "import os, sys; from diffalign.cli import main; code = main(sys.argv[1:]); sys.stderr.flush(); os._exit(code)"
)
"""Leaves before torch's static destructors, which abort now and then after everything is written."""


PLAIN = {"name": "sgd", "lr": 2.0}
"""Adam would turn the rounding of a gradient near zero into a whole step."""


def launch(world: int, *words: object) -> None:
    """The command line on ``world`` processes that talk through gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err.decode()
    finally:
        for process in processes:
            process.kill()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["diffusion-dpo", "diffusion-kto"])
def test_two_processes_train_like_one(cli, config, tmp_path, method):
    """Equal noise per record, one reduction; weights equal on both ranks after each step, or `save_every` fails."""
    run = {"steps": 4, "save_every": 1, "keep": 9}
    # the rounding of an error in float32 moves the logit by beta times 1e-7
    chosen = {"name": method, "objective": {"beta": 10.0}}
    path = config("train", {"method": chosen, "run": run, "optim": PLAIN})
    if method == "diffusion-kto":
        unpaired(path)
    assert cli("train", path, "run.batch=4", f"run.dir={tmp_path / 'one'}").code == 0
    launch(2, "train", path, "run.batch=2", f"run.dir={tmp_path / 'two'}")
    assert cli("train", path, "run.batch=1", "run.accumulate=4", f"run.dir={tmp_path / 'four'}").code == 0
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    # KTO's reference point is that of a micro-batch over all ranks, as published
    others = (two, four) if method == "diffusion-dpo" else (two,)
    for other in others:
        assert losses(other) == pytest.approx(losses(one), abs=1e-6)
        ours, theirs = (load_file(run / "lora/pytorch_lora_weights.safetensors") for run in (other, one))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)
    assert len(set(losses(one))) == 4


def test_a_run_continues_with_another_number_of_processes(cli, config, tmp_path):
    gentle = {"objective": {"beta": 10.0}}
    path = config("train", {"method": gentle, "run": {"steps": 4, "save_every": 2}, "optim": PLAIN})
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli("train", path, f"run.dir={whole}").code == 0
    launch(2, "train", path, "run.batch=2", "run.steps=2")
    assert cli("train", path, "--resume", "latest").code == 0
    assert losses(run) == pytest.approx(losses(whole), abs=1e-6)
    ours, theirs = (load_file(folder / "lora/pytorch_lora_weights.safetensors") for folder in (run, whole))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


FULL = {"model": {"lora": None}, "method": {"objective": {"beta": 10.0}}, "optim": {"name": "adamw", "lr": 1e-4}}


def network(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "transformer/diffusion_pytorch_model.safetensors")


def test_sharded_weights_train_like_whole_ones(cli, config, tmp_path):
    """FSDP2 on two processes, with an average and a frozen reference; it goes on in one process, and stock loads it."""
    import diffusers

    path = config("train", {**FULL, "run": {"steps": 4, "save_every": 2, "keep": 9, "ema": 0.5}})
    one, two, later = (tmp_path / name for name in ("one", "two", "later"))
    assert cli("train", path, f"run.dir={one}").code == 0
    launch(2, "train", path, "run.batch=2", "run.shard=true", f"run.dir={two}")
    assert losses(two) == pytest.approx(losses(one), abs=2e-6)
    for name, value in network(one).items():
        torch.testing.assert_close(network(two)[name], value, rtol=0, atol=2e-6)
    state = load_file(two / "checkpoint-000002/weights.safetensors")
    assert {n for n in state if not n.startswith("average.")} == set(network(one)) - {"pos_embed.pos_embed"}
    launch(2, "train", path, "run.batch=2", "run.shard=true", "run.steps=2", f"run.dir={later}")
    launch(2, "train", path, "run.batch=2", "run.shard=true", f"run.dir={later}", "--resume", "latest")
    assert losses(later) == losses(two)
    assert cli("train", path, f"run.dir={two}", "--resume", str(two / "checkpoint-000002")).code == 0
    assert losses(two) == pytest.approx(losses(one), abs=2e-6)
    assert diffusers.SD3Transformer2DModel.from_pretrained(two / "transformer") is not None


def test_sharding_needs_processes_and_full_weights(refused, config):
    refused("train", config("train"), "run.shard=true", names=["run.shard", "full weights"])
    refused("train", config("train", FULL), "run.shard=true", names=["run.shard", "torchrun"])


def unpaired(path: Path) -> None:
    """Leave one candidate in every record of a config's data, liked or not."""
    import yaml

    from diffalign import records as store

    source = Path(yaml.safe_load(path.read_text())["data"]["records"])
    rows = [
        record.model_copy(
            update={"candidates": [record.candidates[i % 2].model_copy(update={"labels": {"desirable": float(i % 2)}})]}
        )
        for i, record in enumerate(store.read(source))
    ]
    store.write(source, rows)
