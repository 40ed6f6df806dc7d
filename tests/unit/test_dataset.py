"""Buckets, crops, mirrored samples, broken caches, and the order of visits."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign import media
from diffalign.dataset import Dataset, Visit, frame_labels, visits
from diffalign.encoding import Cut
from diffalign.errors import UserError
from diffalign.randomness import keyed
from diffalign.records import Candidate, Record

CPU = torch.device("cpu")


class Pixels:
    """A family whose latents are the pixels it was given."""

    name, fingerprint, modality = "pixels", "0", "image"

    def __init__(self, reads_condition: bool = False, aligned_condition: bool = False) -> None:
        self.reads_condition, self.aligned_condition = reads_condition, aligned_condition
        self.encoded = 0

    def sample_size(self, size):
        return size or (8, 8)

    def latent_shape(self, size):
        return 3, *size

    def encode_prompt(self, prompts):
        """As long as the prompt."""
        longest = max(map(len, prompts))
        mask = torch.tensor([[float(i < len(p)) for i in range(longest)] for p in prompts])
        return {"states": mask[..., None] * 2, "mask": mask}

    def encode_condition(self, images, size):
        return {"control": torch.stack([media.to_tensor(image) for image in images])}

    def encode_geometry(self, views):
        return {"sizes": torch.tensor([[*v.original, *v.crop, *v.target] for v in views], dtype=torch.float32)}

    def encode_media(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        self.encoded += len(samples)
        return samples, torch.full_like(samples, -60.0)

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None) -> Tensor:
        return mean


def ramp(height: int, width: int) -> Image.Image:
    """Climbs from left to right."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())


@pytest.fixture
def make(tmp_path):
    def build(sizes, family=None, cut=None, prompts=None, condition=None, cache="cache"):
        rows = []
        for i, size in enumerate(sizes):
            names = [f"{i}-{k}.png" for k in range(2)]
            for name in names:
                ramp(*size).save(tmp_path / name)
            pair = [Candidate(sample=name, labels={"reward": float(k)}) for k, name in enumerate(names)]
            rows.append(
                Record(id=str(i), prompt=(prompts or "p" * len(sizes))[i], candidates=pair, condition=condition)
            )
        return Dataset(rows, tmp_path, family or Pixels(), tmp_path / cache, cut or Cut())

    return build


def generators(n: int, epoch: int = 0) -> list[torch.Generator]:
    return [keyed(CPU, 0, record, epoch) for record in range(n)]


def test_records_of_a_shape_share_a_bucket(make):
    data = make([(8, 8), (8, 24), (16, 16), (8, 25)], cut=Cut(size=(16, 16), buckets=4))
    assert data.groups[0] == data.groups[2] != data.groups[1] == data.groups[3]
    wide = data.batch([1, 3], generators(2), ("reward",)).x0
    assert wide.shape[:3] == (2, 2, 3)
    assert wide.shape[-1] > 2 * wide.shape[-2]
    square = data.batch([0, 2], generators(2), ("reward",))
    assert square.x0.shape == (2, 2, 3, 16, 16)
    assert square.cond["sizes"].shape == (2, 2, 6)
    assert square.cond["sizes"][1, 0].tolist() == [16, 16, 0, 0, 16, 16]


def test_a_random_crop_is_one_place_for_both_candidates(make):
    data = make([(8, 32)] * 6, cut=Cut(crop="random"))
    batch = data.batch(range(6), generators(6), ())
    assert torch.equal(batch.x0[:, 0], batch.x0[:, 1])
    assert torch.equal(batch.cond["sizes"][:, 0], batch.cond["sizes"][:, 1])
    lefts = batch.cond["sizes"][:, 0, 3]
    assert len(lefts.unique()) > 3
    assert (batch.x0[:, 0, 0, 0, 0].argsort() == lefts.argsort()).all()  # the ramp says where it was cut


def test_both_candidates_are_mirrored_or_neither(make):
    data = make([(8, 8)] * 12, cut=Cut(flip=True), family=Pixels(reads_condition=True), condition="0-0.png")
    climbs = []
    for epoch in range(4):
        batch = data.batch(range(12), generators(12, epoch), ())
        assert torch.equal(batch.x0[:, 0], batch.x0[:, 1])
        assert torch.equal(batch.cond["control"], batch.x0)  # the condition is the same picture, mirrored with it
        climbs += (batch.x0[:, 0, 0, 0, -1] > batch.x0[:, 0, 0, 0, 0]).tolist()
    assert 10 < sum(climbs) < 38
    assert all(a == b for a, b in zip(climbs[:12], (data.batch([i], [keyed(CPU, 0, i, 0)], ()).x0[0, 0, 0, 0, -1] > 0
                                                   for i in range(12)), strict=True))  # fmt: skip


def test_an_aligned_condition_is_cut_as_its_sample_is(make):
    family = Pixels(reads_condition=True, aligned_condition=True)
    for cut in (Cut(), Cut(crop="random"), Cut(size=(8, 16), buckets=4)):
        batch = make([(16, 40)] * 3, cut=cut, family=family, condition="0-0.png").batch(range(3), generators(3), ())
        assert torch.equal(batch.cond["control"], batch.x0)


class Drawn(Pixels):
    """Latents with the noise of the posterior."""

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return mean + noise


def test_one_sample_under_two_conditions_is_one_latent(tmp_path):
    """Condition PO compares errors of one noisy latent: a draw from the posterior per candidate would add its own."""
    for name in ("a.png", "b.png"):
        ramp(8, 8).save(tmp_path / name)
    rows = [
        Record(id=str(i), prompt="p", candidates=[Candidate(sample=name) for name in names])
        for i, names in enumerate((("a.png", "a.png"), ("a.png", "b.png"), ("a.png",)))
    ]
    x0 = Dataset(rows, tmp_path, Drawn(), tmp_path / "cache").batch(range(3), generators(3), ()).x0
    assert torch.equal(x0[0, 0], x0[0, 1])
    assert not torch.equal(x0[1, 0], x0[1, 1])
    assert not torch.equal(x0[0, 0], x0[1, 0])


def test_prompts_of_different_lengths_are_filled_up(make):
    data = make([(8, 8)] * 3, prompts=["a", "bcd", "ef"])
    cond = data.batch([0, 1, 2], generators(3), ()).cond
    assert cond["mask"][:, 0].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert torch.equal(cond["states"][..., 0], 2 * cond["mask"])


def test_prompts_are_dropped_by_the_record_and_the_pass(tmp_path):
    ramp(8, 8).save(tmp_path / "a.png")
    one = [Candidate(sample="a.png", labels={"reward": 0.0})]
    rows = [Record(id=str(i), prompt="abc", candidates=one) for i in range(40)]
    data = Dataset(rows, tmp_path, Pixels(), tmp_path / "cache", dropout=0.25)
    kept = [data.batch([i], [keyed(CPU, 0, i, 0)], ()).cond["mask"].sum().item() == 3 for i in range(40)]
    assert 22 < sum(kept) < 38
    together = data.batch(range(40), generators(40), ()).cond["mask"].sum(-1)[:, 0]
    assert (together == 3).tolist() == kept
    assert set(together.tolist()) == {0.0, 3.0}


def test_a_condition_that_lacks_is_named(make):
    with pytest.raises(UserError, match="record '0': pixels needs a condition image"):
        make([(8, 8)], family=Pixels(reads_condition=True))


def test_a_damaged_cache_is_made_again(make, tmp_path):
    make([(8, 8)] * 2)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # a bit of a tensor, which the format cannot notice
    file.write_bytes(bytes(content))
    family = Pixels()
    data = make([(8, 8)] * 2, family=family)
    assert family.encoded == 4
    assert float(data.batch([0], generators(1), ()).x0.max()) <= 1
    again = Pixels()
    make([(8, 8)] * 2, family=again)
    assert again.encoded == 0


# --- labels of segments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segments", "frames", "lengths"), [(5, 81, [17, 16, 16, 16, 16]), (1, 9, [9]), (2, 9, [5, 4])]
)
def test_segments_are_mapped_by_the_frames_that_a_latent_frame_is_made_of(segments, frames, lengths):
    of_frame = [segment for segment, length in enumerate(lengths) for _ in range(length)]
    assert len(of_frame) == frames
    units = (frames - 1) // 4 + 1
    made_of = [[0], *([4 * u - 3, 4 * u - 2, 4 * u - 1, 4 * u] for u in range(1, units))]
    expected = [{of_frame[frame] for frame in latent} for latent in made_of]
    assert all(len(found) == 1 for found in expected), "no latent frame lies in two segments"
    values = torch.arange(2.0 * segments).reshape(1, 2, segments)
    found = frame_labels(values, units)
    assert found.tolist() == [[[row[next(iter(s))] for s in expected] for row in values[0].tolist()]]
    assert torch.equal(frame_labels(found, units), found)


# --- the order of visits ----------------------------------------------------------------------------------------------


def take(groups, batch, count, seed=0):
    return list(itertools.islice(visits(groups, seed, batch), count))


def test_every_pass_visits_every_record_once():
    found = [visit for batch in take([0] * 10, 3, 10) for visit in batch]
    assert len(set(found)) == 30
    for epoch in range(3):
        assert sorted(v.record for v in found if v.epoch == epoch) == list(range(10))
    assert [v.record for v in found[:10]] != [v.record for v in found[10:20]]
    assert found == [v for batch in take([0] * 10, 5, 6) for v in batch]  # however it is cut


def test_a_batch_has_one_group_and_nothing_is_lost():
    groups = [0, 1, 1, 0, 2, 1, 0]
    batches = take(groups, 2, 70)
    assert all(len({groups[v.record] for v in batch}) == 1 for batch in batches)
    counts = Counter(v.record for batch in batches for v in batch)
    assert max(counts.values()) - min(counts.values()) <= 2
    assert len({visit for batch in batches for visit in batch}) == 140
    assert isinstance(batches[0][0], Visit)


def test_another_seed_is_another_order():
    assert take([0] * 20, 4, 5) != take([0] * 20, 4, 5, seed=1)
