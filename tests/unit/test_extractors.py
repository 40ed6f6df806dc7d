"""Extractors against their formulas and stock models, on random weights in the published formats."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.extractors import extractor_names, load_extractor
from diffalign.extractors.segmentation import NONE, PALETTE, classes


def picture(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def smooth(side: int, seed: int) -> Image.Image:
    """Discs of any grey on grey, a little blurred: edges without noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    canvas = np.full((side, side), 0.5)
    for _ in range(6):
        a, b, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(side / 12, side / 4)
        canvas = np.where((x - a) ** 2 + (y - b) ** 2 < r**2, rng.uniform(0, 1), canvas)
    return Image.fromarray((canvas * 255).astype(np.uint8)).convert("RGB")


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]


def levels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[..., :1]).all(), "grey"
    return pixels[..., 0].astype(int)


# --- canny --------------------------------------------------------------------------------------------------------


def plain_canny(image: Image.Image, low: float, high: float) -> np.ndarray:
    """The operator of kornia by its description: 5x5 Gaussian, Sobel, nearest of eight neighbours, hysteresis."""
    grey = as_tensor(image)[:, :1].double()
    axis = torch.arange(-2, 3, dtype=torch.float64)
    kernel = torch.exp(-(axis**2) / 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    grey = F.conv2d(F.pad(grey, (2, 2, 2, 2), mode="reflect"), kernel[None, None])
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    gx, gy = (F.conv2d(padded, k[None, None])[0, 0].numpy() for k in (sobel, sobel.T))
    size = np.sqrt(gx**2 + gy**2 + 1e-6)
    turn = np.round(np.degrees(np.arctan2(gy, gx)) / 45).astype(int) % 8
    steps = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]
    around = np.pad(size, 1)
    height, width = size.shape
    neighbour = np.stack([around[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in steps])
    ahead, behind = (np.take_along_axis(neighbour, ((turn + k) % 8)[None], 0)[0] for k in (0, 4))
    thin = np.where((size > ahead) & (size > behind), size, 0)
    weak, found = thin > low, thin > high
    while True:
        wide = np.pad(found, 1)
        grown = weak & np.any([wide[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
        if (grown == found).all():
            return found
        found = grown


class TestCanny:
    def test_agrees_with_the_operator_of_controlnet_plus_plus(self):
        scores, near = [], []
        for seed in range(6):
            image = smooth(128, seed)
            ours = levels(load_extractor("canny")([image])[0]) > 0
            theirs = plain_canny(image, 0.1, 0.2)
            scores.append(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
            wide = np.any([np.roll(theirs, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)
            near.append((ours & wide).sum() / ours.sum())
        assert np.mean(scores) > 0.85
        assert np.mean(near) > 0.99

    def test_of_a_square(self):
        image = Image.new("RGB", (40, 30))
        image.paste((255, 255, 255), (10, 8, 30, 22))
        edges = levels(load_extractor("canny")([image])[0])
        assert set(np.unique(edges)) == {0, 255}
        assert 60 < (edges > 0).sum() < 80, "one pixel wide around 20 x 14"
        assert not edges[12:18, 14:26].any()


# --- HED and line art -----------------------------------------------------------------------------------------------


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    fan = {name: max(1, int(np.prod(shape[1:]))) for name, shape in shapes.items()}
    return {name: torch.randn(shape, generator=generator) * (2 / fan[name]) ** 0.5 for name, shape in shapes.items()}


def hed_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"norm": (1, 3, 1, 1)}
    given = 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for layer in range(depth):
            shapes[f"block{block}.convs.{layer}.weight"] = (width, given, 3, 3)
            shapes[f"block{block}.convs.{layer}.bias"] = (width,)
            given = width
        shapes |= {f"block{block}.projection.weight": (1, width, 1, 1), f"block{block}.projection.bias": (1,)}
    state = random_state(shapes)
    # random layers on values of 0 to 255 would saturate the sigmoid
    return {name: value * (0.01 if "projection" in name else 1) for name, value in state.items()}


def hed_forward(state: dict[str, Tensor], image: Tensor) -> Tensor:
    x, sides = (image * 255).clip(0, 255) - state["norm"], []
    for block, depth in enumerate((2, 2, 3, 3, 3), 1):
        x = x if block == 1 else F.max_pool2d(x, 2, 2)
        for layer in range(depth):
            names = (f"block{block}.convs.{layer}.{part}" for part in ("weight", "bias"))
            x = F.conv2d(x, *(state[name] for name in names), padding=1).relu()
        side = F.conv2d(x, state[f"block{block}.projection.weight"], state[f"block{block}.projection.bias"])
        sides.append(F.interpolate(side, image.shape[2:], mode="bilinear"))
    return 1 / (1 + torch.exp(-sum(sides) / 5))


def lineart_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {"model0.1": (64, 3, 7, 7), "model1.0": (128, 64, 3, 3), "model1.3": (256, 128, 3, 3)}
    layers |= {f"model2.{n}.conv_block.{k}": (256, 256, 3, 3) for n in range(3) for k in (1, 5)}
    layers |= {"model3.0": (256, 128, 3, 3), "model3.3": (128, 64, 3, 3), "model4.1": (1, 64, 7, 7)}
    for name, shape in layers.items():
        wide = shape[1] if name.startswith("model3") else shape[0]
        shapes |= {f"{name}.weight": shape, f"{name}.bias": (wide,)}
    return random_state(shapes)


def lineart_forward(state: dict[str, Tensor], image: Tensor) -> Tensor:
    def conv(x: Tensor, name: str, pad: int = 0, transposed: bool = False, **options) -> Tensor:
        run = F.conv_transpose2d if transposed else F.conv2d
        padded = F.pad(x, (pad, pad, pad, pad), mode="reflect") if pad else x
        return run(padded, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    x = F.instance_norm(conv(image, "model0.1", 3)).relu()
    for name in ("model1.0", "model1.3"):
        x = F.instance_norm(conv(x, name, stride=2, padding=1)).relu()
    for n in range(3):
        y = F.instance_norm(conv(x, f"model2.{n}.conv_block.1", 1)).relu()
        x = x + F.instance_norm(conv(y, f"model2.{n}.conv_block.5", 1))
    for name in ("model3.0", "model3.3"):
        x = F.instance_norm(conv(x, name, transposed=True, stride=2, padding=1, output_padding=1)).relu()
    return conv(x, "model4.1", 3).sigmoid()


NETWORKS = {
    "hed": (hed_state, hed_forward),
    "lineart": (lineart_state, lambda state, image: 1 - lineart_forward(state, image)),
}


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def network(request, tmp_path_factory):
    make, forward = NETWORKS[request.param]
    state = make()
    path = tmp_path_factory.mktemp(request.param) / "weights.pth"
    torch.save(state, path)
    return request.param, state, forward, path


class TestEdgeNetworks:
    def test_are_those_published(self, network):
        name, state, forward, path = network
        images = [picture(48, 40, 0), picture(32, 64, 1), picture(48, 40, 2)]
        found = load_extractor(name, path=str(path), device="cpu", batch=2)(images)
        for image, one in zip(images, found, strict=True):
            assert one.size == image.size
            expected = (forward(state, as_tensor(image))[0, 0] * 255).numpy()
            assert np.ptp(expected) > 20, "the random network says something"
            assert np.abs(levels(one) + 0.5 - expected).max() < 0.52

    def test_pictures_of_any_size(self, network):
        name, _, _, path = network
        assert load_extractor(name, path=str(path), device="cpu")([picture(37, 41)])[0].size == (37, 41)

    def test_safetensors(self, network, tmp_path):
        name, state, _, path = network
        save_file(state, tmp_path / "weights.safetensors")
        paths = (str(path), str(tmp_path / "weights.safetensors"))
        first, second = (load_extractor(name, path=p, device="cpu")([picture()])[0] for p in paths)
        assert first.tobytes() == second.tobytes()

    def test_other_weights_are_refused(self, network, tmp_path):
        name, state, _, _ = network
        torch.save({"other": torch.zeros(2)}, tmp_path / "other.pth")
        first = next(iter(state))
        torch.save({**state, first: torch.zeros(7)}, tmp_path / "shape.pth")
        torch.save({"code": Evil()}, tmp_path / "evil.pth")
        for file, message in (
            ("other.pth", "does not fit"),
            ("shape.pth", f"{first} does not fit"),
            ("evil.pth", "without running code"),
            ("none.pth", "no such file"),
        ):
            with pytest.raises(UserError, match=message):
                load_extractor(name, path=str(tmp_path / file))


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


# --- models of transformers -----------------------------------------------------------------------------------------


def tiny_depth(folder, kind: str) -> str:
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTConfig,
        DPTForDepthEstimation,
        DPTImageProcessorPil,
    )

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    if kind == "dpt":
        necks = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
        net = DPTForDepthEstimation(DPTConfig(**small, intermediate_size=16, image_size=32, patch_size=8, **necks))
    else:
        stages = {"out_features": [f"stage{n}" for n in range(1, 5)], "reshape_hidden_states": False}
        backbone = Dinov2Config(**small, mlp_ratio=1, image_size=28, patch_size=14, **stages)
        sizes = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
        net = DepthAnythingForDepthEstimation(
            DepthAnythingConfig(backbone_config=backbone, patch_size=14, head_hidden_size=8, **sizes)
        )
    net.save_pretrained(folder)
    side = 32 if kind == "dpt" else 28
    DPTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["dpt", "depth_anything"])
def test_depth(kind, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    path = tiny_depth(tmp_path, kind)
    images = [picture(48, 40, 0), picture(48, 40, 1), picture(20, 60, 2)]
    found = load_extractor("depth", path=path, device="cpu")(images)
    net = AutoModelForDepthEstimation.from_pretrained(path).eval()
    prepare = AutoImageProcessor.from_pretrained(path, backend="pil")
    for image, one in zip(images, found, strict=True):
        with torch.no_grad():
            depth = net(**prepare(image, return_tensors="pt")).predicted_depth[None]
        depth = F.interpolate(depth, image.size[::-1], mode="bilinear")[0, 0].numpy()
        expected = (depth - depth.min()) / np.ptp(depth) * 255
        assert one.size == image.size
        assert (levels(one).min(), levels(one).max()) == (0, 255)
        assert np.abs(levels(one) + 0.5 - expected).max() < 0.6


def tiny_segmentation(folder, kind: str, labels: int = 150) -> str:
    from transformers import (
        ConvNextConfig,
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessorPil,
        UperNetConfig,
        UperNetForSemanticSegmentation,
    )

    torch.manual_seed(0)
    widths = [8, 8, 16, 16]
    if kind == "segformer":
        sizes = {"depths": [1] * 4, "hidden_sizes": widths, "num_attention_heads": [1, 1, 2, 2]}
        net = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=labels))
    else:
        stages = {"out_features": [f"stage{n}" for n in range(1, 5)], "depths": [1] * 4, "hidden_sizes": widths}
        options = {"hidden_size": 8, "use_auxiliary_head": False, "num_labels": labels, "pool_scales": [1, 2]}
        net = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=ConvNextConfig(**stages), **options))
    net.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}, do_reduce_labels=True).save_pretrained(folder)
    return str(folder)


class TestSegmentation:
    @pytest.mark.parametrize("kind", ["segformer", "upernet"])
    def test_is_the_stock_prediction_in_colour(self, kind, tmp_path):
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        path = tiny_segmentation(tmp_path, kind)
        images = [picture(48, 40, 0), picture(32, 32, 1)]
        found = load_extractor("segmentation", path=path, device="cpu")(images)
        net = AutoModelForSemanticSegmentation.from_pretrained(path).eval()
        prepare = AutoImageProcessor.from_pretrained(path, backend="pil")
        for image, one in zip(images, found, strict=True):
            with torch.no_grad():
                output = net(**prepare(image, return_tensors="pt"))
            [ids] = prepare.post_process_semantic_segmentation(output, target_sizes=[image.size[::-1]])
            assert len(ids.unique()) > 1
            assert (np.asarray(one) == PALETTE[ids.numpy()]).all()

    def test_other_classes_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="7 classes, expected the 150 of ADE20K"):
            load_extractor("segmentation", path=tiny_segmentation(tmp_path, "segformer", 7))

    def test_colours_are_classes(self):
        assert PALETTE.shape == (150, 3)
        assert [PALETTE[n].tolist() for n in (0, 1, 149)] == [[120, 120, 120], [180, 120, 120], [92, 0, 255]]
        strip = Image.fromarray(np.concatenate([PALETTE, np.zeros((1, 3), np.uint8)])[None])
        expected = np.array([*range(150), NONE])
        expected[48] = 6  # skyscraper has the colour of road
        assert (classes(strip)[0] == expected).all()
        nearly = Image.fromarray(np.array([[[121, 119, 122], [2, 1, 0]]], np.uint8))
        assert classes(nearly).tolist() == [[0, NONE]]


def test_refusals(tmp_path):
    assert extractor_names() == ["canny", "depth", "hed", "lineart", "segmentation"]
    for name, params, message in (
        ("cany", {}, "did you mean 'canny'"),
        ("canny", {"lo": 1}, "unknown parameter 'lo'"),
        ("depth", {}, "missing parameter 'path'"),
        ("depth", {"path": str(tmp_path)}, "not a model for AutoModelForDepthEstimation"),
        ("hed", {"path": "x", "device": "gpu"}, "device 'gpu'"),
    ):
        with pytest.raises(UserError, match=message):
            load_extractor(name, **params)
    torch.save(hed_state(), tmp_path / "hed.pth")
    with pytest.raises(UserError, match="batch 0"):
        load_extractor("hed", path=str(tmp_path / "hed.pth"), batch=0)
