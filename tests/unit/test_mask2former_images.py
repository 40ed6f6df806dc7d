"""The images around Mask2Former: OpenCV's resize to the byte, mmdet's padding, and its instances from logits."""

import math

import numpy as np
import pytest
import torch
from diffalign.scorers._mask2former_images import boxes_of, detect, instances, prepare, resize, resized_size
from PIL import Image

CPU = torch.device("cpu")

# --- resize and padding -------------------------------------------------------------------------------------------

SOURCE = [[0, 37, 74, 111, 148], [185, 222, 3, 40, 77], [114, 151, 188, 225, 6]]
LARGER = [  # cv2.resize(SOURCE, (8, 7), interpolation=INTER_LINEAR) of opencv-python 5.0.0
    [0, 16, 39, 62, 85, 109, 132, 148],
    [26, 43, 63, 64, 75, 98, 121, 138],
    [106, 122, 136, 68, 45, 68, 91, 107],
    [185, 201, 208, 71, 15, 38, 61, 77],
    [154, 171, 185, 116, 94, 117, 78, 46],
    [124, 140, 161, 161, 173, 196, 96, 16],
    [114, 130, 153, 176, 200, 223, 102, 6],
]
SMALLER = [[59, 56, 118], [144, 142, 75]]


@pytest.mark.parametrize("expected", [LARGER, SMALLER, SOURCE], ids=["larger", "smaller", "same"])
def test_resize_is_opencvs_to_the_byte(expected):
    source = torch.tensor(SOURCE, dtype=torch.uint8).expand(2, 3, 3, 5)
    out = resize(source, len(expected), len(expected[0]))
    assert out.dtype == torch.uint8
    assert torch.equal(out, torch.tensor(expected, dtype=torch.uint8).expand_as(out))


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((512, 512), (800, 800)), ((1024, 1024), (800, 800)), ((480, 640), (800, 1067)), ((300, 900), (444, 1333))],
)
def test_images_are_fitted_into_1333_by_800(size, fitted):
    assert resized_size(*size) == fitted


def test_padding_is_grey_right_and_below():
    image = Image.new("RGB", (640, 480), (255, 0, 10))
    pixels, inner = prepare([image, image], CPU)
    assert pixels.shape == (2, 3, 800, 1088)
    assert inner == (800, 1067)
    red = (255 - 123.675) / 58.395
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([red, -116.28 / 57.12, (10 - 103.53) / 57.375]))
    assert torch.equal(pixels[:, :, :, :1067], pixels[:, :, :1, :1].expand(2, 3, 800, 1067))
    grey = torch.tensor([(128 - 123.675) / 58.395, (128 - 116.28) / 57.12, (128 - 103.53) / 57.375])
    torch.testing.assert_close(pixels[0, :, 0, 1067:], grey[:, None].expand(3, 21))


# --- instances ----------------------------------------------------------------------------------------------------


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_a_score_is_the_class_times_the_mean_inside_the_mask():
    """Two queries, two classes and nothing; 32 x 32 pixels, a quarter of it as logits, no resize beyond times four."""
    classes = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.7, 0.1]]).log()
    masks = torch.full((2, 8, 8), -3.0)
    masks[0, 2:4, 1:5] = logit(0.9)
    masks[1, 5:, 5:] = 4.0
    found = {(i.label, i.box): i for i in instances(classes, masks, (32, 32), (32, 32), above=0.0)}
    assert len(found) == 4  # every query may be every class
    for label, query in ((0, 0), (1, 0), (0, 1), (1, 1)):
        big = torch.nn.functional.interpolate(masks[None], (32, 32), mode="bilinear", align_corners=False)[0, query]
        rows, columns = np.where((big > 0).numpy())
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        instance = found[label, tuple(float(side) for side in box)]
        assert np.array_equal(instance.mask, (big > 0).numpy())
        mean = big.sigmoid()[big > 0].mean()
        assert instance.score == pytest.approx(float(classes[query].softmax(0)[label] * mean), rel=1e-5)


def test_what_cannot_pass_is_left_out_and_the_rest_does_not_change():
    generator = torch.Generator().manual_seed(0)
    classes, masks = 3 * torch.randn(12, 6, generator=generator), 2 * torch.randn(12, 8, 8, generator=generator)
    everything = instances(classes, masks, (32, 32), (20, 24), above=0.0)
    assert len(everything) == 60
    some = instances(classes, masks, (32, 32), (20, 24), above=0.3)
    assert 3 < len(some) < 30
    key = [(i.label, i.score, i.box) for i in some]
    assert sorted(key) == sorted((i.label, i.score, i.box) for i in everything if i.score > 0.3)
    assert instances(classes, masks, (32, 32), (20, 24), above=1.0) == []


def test_at_most_a_hundred_of_all_queries_and_classes_are_left():
    classes, masks = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.ones(30, 8, 8)
    found = instances(classes, masks, (32, 32), (32, 32), above=0.0)
    probability = classes.softmax(-1)[:, :-1].flatten().sort(descending=True).values[:100]
    assert sorted((i.score for i in found), reverse=True) == pytest.approx((probability * 0.7310586).tolist(), rel=1e-4)


def test_padding_is_cut_off_before_masks_take_the_size_of_the_image():
    masks = torch.full((1, 16, 24), -5.0)
    masks[0, :, 10:] = 5.0  # from column 40 of 96; the image ends at 80 of them
    (found,) = instances(torch.tensor([[9.0, 0.0]]), masks, (64, 80), (32, 40), above=0.3)
    assert found.box == (20, 0, 40, 32)
    assert found.mask.shape == (32, 40)


def test_an_empty_mask_has_no_box_and_no_score():
    assert torch.equal(boxes_of(torch.zeros(2, 4, 5, dtype=torch.bool)), torch.zeros(2, 4))
    assert instances(torch.tensor([[9.0, 0.0]]), torch.full((1, 8, 8), -1.0), (32, 32), (32, 32), above=0.0) == []


class Recorder(torch.nn.Module):
    """Finds one object over the whole image, of class 1 where the image is bright and 0 where it is dark."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, images):
        self.calls.append(tuple(images.shape))
        bright = images.mean((1, 2, 3)) > 0
        classes = torch.stack([~bright, bright, torch.zeros_like(bright)], 1) * 9.0
        b, _, h, w = images.shape
        return classes[:, None], torch.full((b, 1, h // 4, w // 4), 9.0)


def test_images_of_one_size_share_a_batch_and_come_back_in_order():
    sizes = [(64, 64), (64, 32), (64, 64), (64, 64), (64, 32)]
    images = [Image.new("RGB", size, "white" if i % 2 else "black") for i, size in enumerate(sizes)]
    net = Recorder()
    found = detect(net, images, batch=2, dtype=torch.float32, above=0.3)
    assert net.calls == [(2, 3, 800, 800), (1, 3, 800, 800), (2, 3, 672, 1344)]
    assert [[i.label for i in row] for row in found] == [[0], [1], [0], [1], [0]]
    assert [row[0].box[2:] for row in found] == sizes
