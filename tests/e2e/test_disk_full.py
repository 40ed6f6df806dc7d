"""A disk that fills up ends in one line and leaves nothing half-written; with space again the work continues.

The disk is a tmpfs of two megabytes. Where this process may not mount one, the operating system's limit on the size
of a file stands in: writes fail half-way as well, only with another error number.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import records

STEPS = 6


class Disk:
    """A folder that can run out of space."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder = folder
        self.mounted = mounted

    def leave(self, free: int, largest: int) -> str:
        """Leave ``free`` bytes, or let no file grow beyond ``largest``; Python for the process that is to fail."""
        if not self.mounted:
            return f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest}))"
        filler = shutil.disk_usage(self.folder).free - free
        (self.folder / "filler").write_bytes(bytes(filler))
        return ""

    def make_room(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)


@pytest.fixture(params=["tmpfs", "file size limit"])
def disk(request, tmp_path) -> Iterator[Disk]:
    """Both ways where mounting is permitted; elsewhere the limit alone, twice."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = request.param == "tmpfs" and _mount(folder)
    yield Disk(folder, mounted)
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(folder: Path) -> bool:
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def assert_disk_full(result: tuple[int | None, str], where: Path | str) -> None:
    code, err = result
    assert code == 2, err
    assert err.startswith(f"diffalign: error: disk full while writing {where}"), err
    assert err.endswith("; free space and resume\n")
    assert err.count("\n") == 1, err


def nothing_aside(folder: Path) -> bool:
    return not list(folder.rglob("*.tmp"))


def test_training(cli, config, warm, disk, tmp_path):
    run, whole = disk.folder / "run", tmp_path / "whole"
    path = config("train", {"run": {"steps": STEPS, "save_every": 1, "dir": str(run)}})
    assert cli("train", path, f"run.dir={whole}").code == 0
    assert cli("train", path, "run.steps=2").code == 0
    good = {p.name: p.read_bytes() for p in (run / "checkpoint-000002").iterdir()}
    shutil.rmtree(run / "lora")

    first = disk.leave(free=50_000, largest=40_000)
    assert_disk_full(warm.run("train", path, "--resume", first=first), run / "checkpoint-000003")
    assert {p.name: p.read_bytes() for p in (run / "checkpoint-000002").iterdir()} == good
    assert [p.name for p in sorted(run.glob("checkpoint-*"))] == ["checkpoint-000001", "checkpoint-000002"]
    assert nothing_aside(run)

    disk.make_room()
    assert cli("train", path, "--resume").code == 0
    last = f"checkpoint-{STEPS:06d}/weights.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()
    for name in (p.name for p in (whole / "lora").iterdir()):
        ours, theirs = load_file(run / "lora" / name), load_file(whole / "lora" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_generation_and_scoring(cli, config, warm, disk, tmp_path):
    pool, whole = disk.folder / "pool", tmp_path / "whole"
    changes = {"prompts": {"limit": 12}, "sampling": {"batch": 2}, "out": str(pool)}
    path = config("generate", changes)
    assert cli("generate", path, f"out={whole}").code == 0

    first = disk.leave(free=40_000, largest=1_000)
    assert_disk_full(warm.run("generate", path, first=first), pool)
    assert nothing_aside(pool)
    for image in pool.glob("media/*"):
        assert records.read_image(pool, f"media/{image.name}").size == (32, 32)
    disk.make_room()
    assert cli("generate", path).code == 0
    assert (pool / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()

    files = {"records": str(pool / "records.jsonl"), "out": str(pool / "scored.jsonl"), "batch": 2}
    score = config("score", files)
    changed = [f"{key}={value.replace(str(pool), str(whole))}" for key, value in files.items() if key != "batch"]
    assert cli("score", score, *changed).code == 0
    first = disk.leave(free=4_096, largest=2_000)
    assert_disk_full(warm.run("score", score, first=first), pool / "scored.jsonl")
    disk.make_room()
    assert cli("score", score).code == 0
    assert (pool / "scored.jsonl").read_bytes() == (whole / "scored.jsonl").read_bytes()


def test_building_leaves_the_old_output(cli, config, warm, disk, own_pairs):
    source = shutil.copytree(own_pairs.parent, disk.folder / "data") / own_pairs.name
    out = source.with_name("built.jsonl")
    path = config("build", {"records": str(source), "out": str(out)})
    assert cli("build", path).code == 0
    before = out.read_bytes()
    first = disk.leave(free=0, largest=1_000)
    assert_disk_full(warm.run("build", path, first=first), out)
    assert out.read_bytes() == before
    assert nothing_aside(source.parent)


def test_a_full_device_as_output():
    """Nothing is written twice to a broken stdout: the flush at exit stays quiet."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "diffalign", "train", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert_disk_full((done.returncode, done.stderr), "a file")
