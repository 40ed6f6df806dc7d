"""A killed command line continues where it stopped and ends exactly where an undisturbed one does."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import records

STEPS = 24
SETTINGS = {"run": {"steps": STEPS, "batch": 16, "save_every": 3}, "optim": {"warmup": 5, "decay": "cosine"}}
FULL = {**SETTINGS, "model": {"lora": None}}
LORA = {**SETTINGS, "run": {**SETTINGS["run"], "ema": 0.9}}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def visible(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those written aside, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, list]]:
    """Every tensor of the safetensors files of a folder; the order of their headers' entries is up to the library."""
    state = {f"{path.name}.{k}": v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    return {name: (value.dtype, value.tolist()) for name, value in state.items()}


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in lines(run / "metrics.jsonl")]
    return [{key: value for key, value in row.items() if key not in ("seconds", "cpu", "memory")} for row in rows]


def flat(value, name="") -> dict[str, object]:
    """A nested state as one mapping, tensors as lists, so that == compares it to the bit."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in flat(inner, f"{name}.{key}").items()}
    return {name: (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value}


def assert_same_run(ours: Path, whole: Path, final: str) -> None:
    checkpoints = [f"checkpoint-{step:06d}" for step in (STEPS - 3, STEPS)]
    assert [p.name for p in sorted(ours.glob("*checkpoint-*"))] == checkpoints, "nothing more, nothing half-written"
    assert tensors(ours / final) == tensors(whole / final) != {}
    assert metrics(ours) == metrics(whole)
    assert [row["step"] for row in metrics(ours)] == list(range(1, STEPS + 1))
    for name in checkpoints:
        weights = "weights.safetensors"
        assert (ours / name / weights).read_bytes() == (whole / name / weights).read_bytes()
        states = [flat(torch.load(run / name / "state.pt", weights_only=True)) for run in (ours, whole)]
        assert states[0] == states[1]


@pytest.mark.parametrize(("changes", "final", "kills"), [(LORA, "lora", 3), (FULL, "transformer", 1)])
def test_killed_training_ends_bit_identical(cli, config, warm, tmp_path, changes, final, kills):
    whole, run = tmp_path / "whole", tmp_path / "run"
    path = config("train", changes)
    assert cli("train", path, f"run.dir={whole}").code == 0
    assert metrics(whole)[-1]["gap"] > 0, "the weights must move, or this test shows nothing"

    moments = random.Random(7)
    for step in sorted(moments.sample(range(1, STEPS - 8), kills)):
        delay = moments.uniform(0, 0.03)
        warm.kill(lambda step=step: len(lines(run / "metrics.jsonl")) >= step, delay, "train", path, "--resume=latest")
        assert not (run / final).exists()
    assert cli("train", path, "--resume", "latest").code == 0
    assert_same_run(run, whole, final)


CRASHES = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from diffalign.train.run import Run
from diffalign.weights import Weights

root = Path(sys.argv[1])

def parts():
    torch.manual_seed(0)
    weights = Weights(torch.nn.Linear(3, 3), lora=False, copies=("average",))
    optimizer = torch.optim.AdamW(weights.trainable())
    return weights, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

def run(folder):
    return Run(folder, torch.device("cpu"), "fp32", seed=0, keep=2)

def latest(folder):
    crashed = run(folder)
    return crashed.restore(crashed.open("", "latest"), *parts())

def crash_at(count, folder):
    def hook(event, args):
        nonlocal count
        if event != "os.kill" and event.split(".")[0] in ("open", "os", "shutil"):
            count -= 1
            if count < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    mine = run(folder), parts()
    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        mine[0].save(step, *mine[1], {})
        os._exit(0)
    return os.waitpid(child, 0)[1]

for first in (3, 6, 9):
    run(root / "base").save(first, *parts(), {})
for step in (9, 12):  # a checkpoint that is there already, and a new one
    seen, count = set(), 0
    while True:
        folder = root / f"crash-{step}-{count}"
        shutil.copytree(root / "base", folder)
        status = crash_at(count, folder)
        assert status in (0, signal.SIGKILL), status
        seen.add(latest(folder))
        run(folder).save(step, *parts(), {})
        assert latest(folder) == step
        left = sorted(path.name for path in folder.iterdir())
        assert left == [f"checkpoint-{kept:06d}" for kept in ((6, 9) if step == 9 else (9, 12))] + ["config.yaml"], left
        count += 1
        if status == 0:
            break
    print(step, count, *sorted(seen))
"""


def test_a_checkpoint_killed_at_any_file_operation_is_old_or_new(tmp_path):
    """Every open, rename and removal of a save is a moment to die at; the newest checkpoint must load every time."""
    done = subprocess.run([sys.executable, "-c", CRASHES, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rewritten, new = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert rewritten[0] == 9
    assert set(rewritten[2:]) <= {6, 9}
    assert new[0] == 12
    assert new[2:] == [9, 12]
    assert min(rewritten[1], new[1]) > 10, "the hook must see the operations, or this test shows nothing"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in folder.glob("[!.]*")}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def test_killed_generation_redoes_nothing_and_loses_nothing(cli, config, warm, tmp_path):
    changes = {"prompts": {"limit": 10}, "candidates": 3, "sampling": {"steps": 16, "batch": 7, "guidance": 2.0}}
    path, pool, whole = config("generate", changes), tmp_path / "pool", tmp_path / "whole"
    assert cli("generate", path, f"out={whole}").code == 0

    media = pool / "media"
    moments = random.Random(3)
    for images in sorted(moments.sample(range(1, 19), 2)):
        before = stamps(media)
        delay = moments.uniform(0, 0.02)
        warm.kill(lambda images=images: len(list(media.glob("[!.]*"))) >= images, delay, "generate", path)
        assert before.items() <= stamps(media).items()
        for line in lines(pool / "records.jsonl"):
            for candidate in json.loads(line)["candidates"]:
                records.read_image(pool, candidate["sample"])
    before = stamps(media)
    assert len(before) < 30, "killed too late, or this test shows nothing"
    assert cli("generate", path).code == 0
    assert before.items() <= stamps(media).items(), "no image was written twice"
    assert (pool / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    assert visible(media) == visible(whole / "media")

    before = stamps(media)
    assert cli("generate", path).code == 0
    assert stamps(media) == before, "a finished stage has nothing to do"


def test_killed_scoring_redoes_nothing_and_loses_nothing(cli, config, warm, own_pairs):
    pairs = list(records.read(own_pairs))
    many = [r.model_copy(update={"id": f"{n}-{r.id}"}) for n in range(5) for r in pairs]
    records.write(own_pairs, many)
    path, out, whole = (
        config("score", {"batch": 5}),
        own_pairs.with_name("scored.jsonl"),
        own_pairs.with_name("w.jsonl"),
    )
    assert cli("score", path, f"out={whole}").code == 0

    moments = random.Random(5)
    for count in sorted(moments.sample(range(1, 40), 2)):
        held = out.read_bytes() if out.is_file() else b""
        warm.kill(lambda count=count: len(lines(out)) >= count, moments.uniform(0, 0.01), "score", path)
        assert out.read_bytes().startswith(held)
    held = out.read_bytes()
    assert held.count(b"\n") < len(many), "killed too late, or this test shows nothing"
    stamp = out.stat().st_ino
    assert cli("score", path).code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert out.read_bytes().startswith(held[: held.rfind(b"\n") + 1])
    assert out.stat().st_ino == stamp, "appended to, not rewritten"


def test_a_record_torn_by_a_kill_is_not_read_as_whole(cli, config, own_pairs):
    whole = own_pairs.read_bytes()
    score = config("score")
    for cut in (whole[:-1], whole[:-40]):
        own_pairs.write_bytes(cut)
        for words in (("score", score), ("build", config("build")), ("train", config("train"))):
            outcome = cli(*words)
            assert outcome.code == 2
            assert f"{own_pairs}:16: the last line is cut off" in outcome.err
    own_pairs.write_bytes(whole)
    out = own_pairs.with_name("scored.jsonl")
    assert cli("score", score).code == 0
    scored = out.read_bytes()
    out.write_bytes(scored[:-9])
    assert cli("score", score).code == 0
    assert out.read_bytes() == scored
