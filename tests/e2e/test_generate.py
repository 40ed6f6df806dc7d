"""`diffalign generate` on the embedded model: several sources, seeds that decide samples, started ones, resuming."""

import numpy as np
import pytest
from PIL import Image

from diffalign import generate, records
from diffalign.config import GenerateConfig
from diffalign.errors import UserError
from diffalign.generate import expand, start_level, start_strength
from diffalign.records import Record
from diffalign.schedule import Rectified

MODEL = {"family": "sd3", "path": "embedded:shapes"}
FEW = {"sampling": {"steps": 4, "batch": 8}, "prompts": {"source": "shapes:train", "limit": 5}, "candidates": 2}
TWO = {"plain": {}, "guided": {"sampling": {"guidance": 3.0}, "candidates": 1, "seed": 7}}


def config(out, **changes) -> GenerateConfig:
    return GenerateConfig.model_validate({"model": MODEL, "out": str(out), **FEW, **changes})


def pixels(root, record, k) -> np.ndarray:
    return np.asarray(Image.open(root / record.candidates[k].sample), dtype=np.int16)


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("media/*.png")}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Read only."""
    out = tmp_path_factory.mktemp("pool") / "pool"
    generate.run(config(out, sources=TWO))
    return out


class TestSources:
    def test_one_record_has_the_candidates_of_all(self, pool):
        rows = list(records.read(pool / "records.jsonl"))
        assert [row.id for row in rows] == [f"{i:06d}" for i in range(5)]
        for row in rows:
            origins = [c.origin for c in row.candidates]
            assert [o["source"] for o in origins] == ["plain", "plain", "guided"]
            assert [o["guidance"] for o in origins] == [1.0, 1.0, 3.0]
            assert {o["steps"] for o in origins} == {4}, "what a source does not say is as at the top"
            assert len({o["seed"] for o in origins}) == 3
            assert all(len(o["revision"]) == 16 for o in origins)
            assert len({c.sample for c in row.candidates}) == 3

    def test_a_source_is_what_it_would_be_alone(self, pool, tmp_path):
        alone = tmp_path / "alone"
        generate.run(config(alone, candidates=1, seed=7, sampling={"steps": 4, "batch": 8, "guidance": 3.0}))
        together, single = records.read(pool / "records.jsonl"), records.read(alone / "records.jsonl")
        for a, b in zip(together, single, strict=True):
            assert a.candidates[2].origin["seed"] == b.candidates[0].origin["seed"]
            assert (pixels(pool, a, 2) == pixels(alone, b, 0)).all()

    def test_stopped_between_and_within_sources(self, pool, tmp_path, monkeypatch):
        out = tmp_path / "stopped"
        for calls in (2, 1, 2):  # a batch holds four prompts of one source, eight of the other
            with monkeypatch.context() as patch:
                patch.setattr(generate, "sample_media", interrupted(generate.sample_media, calls))
                with pytest.raises(KeyboardInterrupt):
                    generate.run(config(out, sources=TWO))
            assert not (out / "records.jsonl").exists()
        generate.run(config(out, sources=TWO))
        assert (out / "records.jsonl").read_bytes() == (pool / "records.jsonl").read_bytes()
        assert pictures(out) == pictures(pool)

    def test_names_become_file_names(self, tmp_path):
        with pytest.raises(UserError, match=r"sources: '\.\./x' becomes part of file names"):
            generate.run(config(tmp_path, sources={"../x": {}}))

    def test_each_has_a_complete_config(self, tmp_path):
        parts = expand(config(tmp_path, sources={"a": {"model": {**MODEL, "adapter": "x"}}, "b": {"candidates": 9}}))
        assert (parts["a"].model.adapter, parts["b"].model.adapter) == ("x", None)
        assert (parts["a"].candidates, parts["b"].candidates) == (2, 9)
        assert expand(parts["a"]) == {"": parts["a"]}

    def test_another_source_is_another_pool(self, pool):
        with pytest.raises(UserError, match=r"was made with different .*sources"):
            generate.run(config(pool, sources={"plain": {}}))


def interrupted(function, calls: int):
    """The function, until it was called so often."""
    made = iter(range(calls - 1))

    def call(*args):
        if next(made, None) is None:
            raise KeyboardInterrupt
        return function(*args)

    return call


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_sample_depends_on_its_seed_whatever_the_batch(pool, tmp_path, batch):
    out = tmp_path / "pool"
    generate.run(config(out, sampling={"steps": 4, "batch": batch}))
    for whole, own in zip(records.read(pool / "records.jsonl"), records.read(out / "records.jsonl"), strict=True):
        for k in range(2):
            assert own.candidates[k].origin["seed"] == whole.candidates[k].origin["seed"]
            difference = np.abs(pixels(out, own, k) - pixels(pool, whole, k))
            assert difference.max() <= 1, "the last bits of a matrix product depend on its height"


class TestStarted:
    """DenseDPO's pairs: the candidates of a record begin from its own picture, noised to one level."""

    @pytest.fixture
    def prompts(self, pool, tmp_path):
        root = tmp_path / "real"
        rows = []
        for row in records.read(pool / "records.jsonl"):
            name = f"{row.id}.png"
            root.mkdir(exist_ok=True)
            (root / name).write_bytes((pool / row.candidates[0].sample).read_bytes())
            rows.append(row.model_copy(update={"source": name, "candidates": []}))
        records.write(root / "prompts.jsonl", rows)
        return root / "prompts.jsonl"

    def test_less_noise_stays_closer(self, prompts, tmp_path):
        distances = {}
        for level in (0.25, 0.75):
            out = tmp_path / f"{level}"
            generate.run(config(out, prompts={"source": str(prompts)}, strength=[level, level]))
            rows = list(records.read(out / "records.jsonl"))
            real = [np.asarray(Image.open(out / row.source), dtype=np.int16) for row in rows]
            distances[level] = np.mean([np.abs(pixels(out, row, 0) - x).mean() for row, x in zip(rows, real)])  # noqa: B905
            assert all(not np.array_equal(pixels(out, row, 0), pixels(out, row, 1)) for row in rows)
            assert {c.origin["strength"] for row in rows for c in row.candidates} == {level}
        assert distances[0.25] < 0.6 * distances[0.75]

    def test_a_record_has_one_level(self, prompts, tmp_path):
        generate.run(config(tmp_path / "out", prompts={"source": str(prompts)}, strength=[0.3, 0.9]))
        levels = [{c.origin["strength"] for c in r.candidates} for r in records.read(tmp_path / "out/records.jsonl")]
        assert all(len(level) == 1 for level in levels)
        assert len(set.union(*levels)) == 5
        assert all(0.3 <= value <= 0.9 for level in levels for value in level)

    def test_without_a_source(self, tmp_path):
        with pytest.raises(UserError, match="record '000000': `strength` starts from a record's `source`"):
            generate.run(config(tmp_path / "out", strength=[0.5, 0.5]))

    @pytest.mark.parametrize("strength", [[0.9, 0.3], [0.0, 0.5], [0.5, 1.5]])
    def test_levels_that_are_none(self, tmp_path, strength):
        with pytest.raises(UserError, match="two rising numbers"):
            generate.run(config(tmp_path / "out", strength=strength))

    def test_levels_of_the_grid(self):
        grid = Rectified(shift=3.0).grid(5)
        levels = [start_level(grid, value) for value in (1.0, float(grid[1]), float(grid[1]) - 0.01, 0.0)]
        assert levels == [0, 1, 2, 4], "the first not above; at least one step is left"

    def test_strengths_are_spread(self):
        drawn = [start_strength(0, f"{i:06d}", 0.65, 0.8) for i in range(400)]
        assert 0.65 <= min(drawn) < 0.66
        assert 0.79 < max(drawn) <= 0.8
        assert np.mean(drawn) == pytest.approx(0.725, abs=0.01)


def test_extracted_conditions_lie_beside_the_samples(tmp_path):
    generate.run(config(tmp_path, extract={"name": "canny", "params": {"low": 0.02, "high": 0.05}}))
    for row in records.read(tmp_path / "records.jsonl"):
        for k, candidate in enumerate(row.candidates):
            edges = np.asarray(Image.open(tmp_path / candidate.origin["condition"]))
            assert set(np.unique(edges)) == {0, 255}, "edges and none"
            assert edges.shape == pixels(tmp_path, row, k).shape


def test_extractors_that_are_none(tmp_path):
    for params, message in (
        ({"name": "cany"}, "did you mean 'canny'"),
        ({"name": "canny", "params": {"lo": 1}}, "'lo'"),
    ):
        with pytest.raises(UserError, match=message):
            generate.run(config(tmp_path / "out", extract=params))


def test_conditions_and_sources_of_prompts_must_be_there(tmp_path):
    records.write(tmp_path / "p.jsonl", [Record(id="a", prompt="a red circle", source="gone.png")])
    with pytest.raises(UserError, match=r"record '000000': .*gone\.png: no such source file"):
        generate.run(config(tmp_path / "out", prompts={"source": str(tmp_path / "p.jsonl")}))
