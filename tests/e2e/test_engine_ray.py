"""The Ray engine: the same results in the same order as the local one, also when a worker is killed on the way."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from diffalign import generate, records, score
from diffalign.config import GenerateConfig, ScoreConfig
from diffalign.engines import stream
from diffalign.records import Candidate, Record

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of its own settings


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two workers on this machine; ended with the module."""
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()


def doubled(fatal: str = "", marker: str = ""):
    """A worker that doubles texts; it is killed once, when it meets the text that is fatal."""

    def work(group):
        for record in group:
            if record.prompt == fatal and not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [
            record.model_copy(update={"prompt": record.prompt * 2, "meta": {"pid": os.getpid()}}) for record in group
        ]

    return work


GROUPS = [[Record(id=f"{g}-{i}", prompt=f"{g}{i}") for i in range(3)] for g in range(12)]


def met(folder: str):
    """As :func:`doubled`, by a worker that does not begin before another one is there."""
    work = doubled()

    def once(group):
        (Path(folder) / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return work(group)

    return once


def test_results_are_in_order_and_from_two_workers(tmp_path):
    found = list(stream(partial(met, str(tmp_path)), GROUPS, "ray", 2))
    assert [[r.id for r in group] for group in found] == [[r.id for r in group] for group in GROUPS]
    assert [r.prompt for r in found[3]] == ["3030", "3131", "3232"]
    assert len({r.meta["pid"] for group in found for r in group} - {os.getpid()}) == 2


def test_a_killed_worker_loses_nothing(tmp_path):
    marker = tmp_path / "killed"
    found = list(stream(partial(doubled, "51", str(marker)), GROUPS, "ray", 2))
    assert marker.exists()
    assert [r.id for group in found for r in group] == [r.id for group in GROUPS for r in group]
    assert [r.prompt for r in found[5]] == ["5050", "5151", "5252"]


def test_without_groups_nothing_is_loaded():
    def load():
        raise AssertionError

    for engine in ("local", "ray"):
        assert list(stream(load, [], engine, 1)) == []


def test_scores_are_those_of_the_local_engine(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        names = [f"{i}-{k}.png" for k in range(2)]
        for name in names:
            Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(tmp_path / name)
        rows.append(Record(id=str(i), prompt="p", candidates=[Candidate(sample=name) for name in names]))
    (tmp_path / "3-1.png").write_text("no image")
    records.write(tmp_path / "in.jsonl", rows)
    files = {}
    for engine in ("local", "ray"):
        out = tmp_path / f"{engine}.jsonl"
        scorers = [{"name": "jpeg"}, {"name": "picture"}]
        content = {"records": str(tmp_path / "in.jsonl"), "out": str(out), "scorers": scorers, "batch": 4}
        score.run(ScoreConfig.model_validate({**content, "engine": engine, "workers": 2}))
        files[engine] = out.read_bytes()
    assert files["ray"] == files["local"]
    assert b"not an image" in files["local"]


def test_samples_are_those_of_the_local_engine(tiny_sd3, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue ring\na green square\ntwo rings\n")
    pools = {}
    for engine in ("local", "ray"):
        out = tmp_path / engine
        content = {
            "model": {"family": "sd3", "path": str(tiny_sd3), "device": "cpu"},
            "prompts": {"source": str(tmp_path / "prompts.txt")},
            "candidates": 2,
            "sampling": {"steps": 2, "batch": 4},
            "out": str(out),
        }
        generate.run(GenerateConfig.model_validate({**content, "engine": engine, "workers": 2}))
        pictures = {path.name: path.read_bytes() for path in sorted((out / "media").iterdir())}
        pools[engine] = ((out / "records.jsonl").read_bytes(), pictures)
    assert len(pools["local"][1]) == 8
    assert pools["ray"] == pools["local"]
