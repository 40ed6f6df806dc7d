"""How pictures are cut and clips are kept."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import media
from diffalign.errors import UserError


def gradient(height: int, width: int) -> Image.Image:
    """Red climbs to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 * x / width, 255 * y / height, 0 * x], -1).astype(np.uint8))


def test_a_view_covers_the_target_and_says_where_it_is():
    how = media.view((100, 300), (50, 50), (0.0, 1.0))
    assert how == media.View((100, 300), (50, 150), (0, 100), (50, 50))
    cut = media.to_tensor(media.cut(gradient(100, 300), how))
    assert cut.shape == (3, 50, 50)
    assert float(cut[0].min()) > 0.25  # the right third
    assert media.view((100, 300), (50, 50)).crop == (0, 50)
    assert media.view((20, 20), (50, 40)).scaled == (50, 50)  # too small: enlarged


def test_the_place_of_a_crop_belongs_to_the_record():
    places = [media.crop_place(str(i)) for i in range(200)]
    assert places[3] == media.crop_place("3")
    assert np.mean(places) == pytest.approx(0.5, abs=0.05)
    assert all(0 <= value < 1 for place in places for value in place)


@pytest.mark.parametrize(
    ("ratio", "size"), [(1.0, (512, 512)), (2.0, (704, 352)), (0.5, (352, 704)), (0.75, (448, 576))]
)
def test_buckets_keep_the_aspect_ratio_within_the_area(ratio, size):
    found = media.bucket(ratio, (512, 512), 32)
    assert found[0] % 32 == found[1] % 32 == 0
    assert found[0] * found[1] <= 512 * 512
    assert abs(found[0] / found[1] - ratio) <= abs(size[0] / size[1] - ratio) + 1e-9
    assert found[0] * found[1] > 0.8 * 512 * 512


def test_an_area_without_buckets_is_refused():
    with pytest.raises(UserError, match=r"data\.buckets: no multiple of 64"):
        media.bucket(1.0, (32, 32), 64)


def test_a_clip_comes_back(tmp_path):
    clip = torch.stack([media.to_tensor(gradient(32, 48)).roll(4 * i, 2) / 2 + 0.5 for i in range(5)], 1)
    media.write("video", tmp_path / "media/a.mp4", clip)
    assert media.picture_size("video", tmp_path, "media/a.mp4") == (32, 48)
    assert media.frame_count(tmp_path, "media/a.mp4") == len(clip[0])
    back = media.read("video", tmp_path, "media/a.mp4", (5, 32, 48), (0.5, 0.5))
    assert back.shape == (3, 5, 32, 48)
    assert float((back / 2 + 0.5 - clip).abs().mean()) < 0.02
    assert float((back[:, 0] - back[:, 4]).abs().mean()) > 0.1
    half = media.read("video", tmp_path, "media/a.mp4", (3, 16, 16), (0.5, 0.5))
    assert half.shape == (3, 3, 16, 16)
    with pytest.raises(UserError, match=r"a\.mp4: has 5 frames, 6 are needed"):
        media.read("video", tmp_path, "media/a.mp4", (6, 32, 48), (0.5, 0.5))


@pytest.mark.parametrize("content", [b"", b"not a clip", b"\0\0\0\x18ftypmp42"])
def test_a_broken_clip_is_one_line(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.mp4: truncated or not a clip"):
        media.read("video", tmp_path, "a.mp4", (2, 8, 8), (0.5, 0.5))
    with pytest.raises(UserError, match=r"b\.mp4: no such clip"):
        media.read("video", tmp_path, "b.mp4", (2, 8, 8), (0.5, 0.5))
