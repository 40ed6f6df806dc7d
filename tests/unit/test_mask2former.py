"""The detector of GenEval: mmdet's names and shapes, and the same numbers as transformers' independent network."""

import pickle

import numpy as np
import pytest
import torch
from diffalign.scorers._mask2former import Mask2Former, Sizes, load
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import UserError

TINY = Sizes(
    embed=8,
    depths=(2, 2, 2, 2),
    heads=(1, 2, 4, 8),
    window=3,
    width=64,
    attention_heads=4,
    encoder_layers=2,
    encoder_hidden=48,
    decoder_layers=4,
    decoder_hidden=40,
    queries=6,
    classes=3,
)

# --- names and shapes ---------------------------------------------------------------------------------------------


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def ffn(name: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return linear(f"{name}.layers.0.0", hidden, width) | linear(f"{name}.layers.1", width, hidden)


def backbone_table() -> dict[str, tuple[int, ...]]:
    table = {"backbone.patch_embed.projection.weight": (96, 3, 4, 4), "backbone.patch_embed.projection.bias": (96,)}
    table |= norm("backbone.patch_embed.norm", 96)
    for stage, (width, depth, heads) in enumerate([(96, 2, 3), (192, 2, 6), (384, 18, 12), (768, 2, 24)]):
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}"
            table |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
            table[f"{name}.attn.w_msa.relative_position_bias_table"] = (169, heads)
            table[f"{name}.attn.w_msa.relative_position_index"] = (49, 49)
            table |= linear(f"{name}.attn.w_msa.qkv", 3 * width, width)
            table |= linear(f"{name}.attn.w_msa.proj", width, width) | ffn(f"{name}.ffn", width, 4 * width)
        if stage < 3:
            name = f"backbone.stages.{stage}.downsample"
            table |= norm(f"{name}.norm", 4 * width) | {f"{name}.reduction.weight": (2 * width, 4 * width)}
        table |= norm(f"backbone.norm{stage}", width)
    return table


def head_table() -> dict[str, tuple[int, ...]]:
    table = {}
    pixel = "panoptic_head.pixel_decoder"
    for level, channels in enumerate((768, 384, 192)):
        name = f"{pixel}.input_convs.{level}"
        table |= {f"{name}.conv.weight": (256, channels, 1, 1), f"{name}.conv.bias": (256,)} | norm(f"{name}.gn", 256)
    for layer in range(6):
        name = f"{pixel}.encoder.layers.{layer}"
        table |= linear(f"{name}.attentions.0.sampling_offsets", 192, 256)
        table |= linear(f"{name}.attentions.0.attention_weights", 96, 256)
        table |= linear(f"{name}.attentions.0.value_proj", 256, 256)
        table |= linear(f"{name}.attentions.0.output_proj", 256, 256) | ffn(f"{name}.ffns.0", 256, 1024)
        table |= norm(f"{name}.norms.0", 256) | norm(f"{name}.norms.1", 256)
    table[f"{pixel}.level_encoding.weight"] = (3, 256)
    table |= {f"{pixel}.lateral_convs.0.conv.weight": (256, 96, 1, 1)} | norm(f"{pixel}.lateral_convs.0.gn", 256)
    table |= {f"{pixel}.output_convs.0.conv.weight": (256, 256, 3, 3)} | norm(f"{pixel}.output_convs.0.gn", 256)
    table |= {f"{pixel}.mask_feature.weight": (256, 256, 1, 1), f"{pixel}.mask_feature.bias": (256,)}
    for layer in range(9):
        name = f"panoptic_head.transformer_decoder.layers.{layer}"
        for attention in (f"{name}.attentions.0.attn", f"{name}.attentions.1.attn"):
            table |= {f"{attention}.in_proj_weight": (768, 256), f"{attention}.in_proj_bias": (768,)}
            table |= linear(f"{attention}.out_proj", 256, 256)
        table |= ffn(f"{name}.ffns.0", 256, 2048)
        for index in range(3):
            table |= norm(f"{name}.norms.{index}", 256)
    table |= norm("panoptic_head.transformer_decoder.post_norm", 256)
    for name, rows in (("query_embed", 100), ("query_feat", 100), ("level_embed", 3)):
        table[f"panoptic_head.{name}.weight"] = (rows, 256)
    table |= linear("panoptic_head.cls_embed", 81, 256)
    for index in (0, 2, 4):
        table |= linear(f"panoptic_head.mask_embed.{index}", 256, 256)
    return table


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        net = Mask2Former()
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == backbone_table() | head_table()
    assert sum(p.numel() for p in net.parameters()) == 68_739_547  # transformers' 68,741,083 less a norm of 2 x 768


def test_the_whole_network_stays_on_its_device():
    """Meta tensors refuse to meet others; a 512 x 512 image comes in as 800 x 800."""
    with torch.device("meta"):
        net, images = Mask2Former().eval(), torch.empty(2, 3, 800, 800)
    classes, masks = net(images)
    assert classes.shape == (2, 100, 81)
    assert masks.shape == (2, 100, 200, 200)


def test_the_position_index_is_that_of_mmdet():
    """There: c_i + c_j with c = (2 w - 1) y + x, its columns reversed."""
    index = Mask2Former(TINY).get_buffer("backbone.stages.0.blocks.0.attn.w_msa.relative_position_index")
    code = (5 * torch.arange(3)[:, None] + torch.arange(3)).flatten()
    assert torch.equal(index, (code[:, None] + code).flip(1))


def test_patch_merging_orders_channels_as_unfold_does():
    merge = Mask2Former(TINY).backbone.stages[0].downsample.double()
    x = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    unfolded = torch.nn.functional.unfold(
        torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).permute(0, 3, 1, 2), 2, stride=2
    )
    expected = merge.reduction(merge.norm(unfolded.transpose(1, 2)))
    torch.testing.assert_close(merge(x).flatten(1, 2), expected)


# --- against transformers -----------------------------------------------------------------------------------------


def theirs() -> torch.nn.Module:
    """transformers' network of the same sizes with random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=3, out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=48,
        dim_feedforward=40,
        encoder_layers=2,
        decoder_layers=5,  # theirs counts the prediction before the first layer
        num_attention_heads=4,
        num_queries=6,
        num_labels=3,
    )
    net = Mask2FormerForUniversalSegmentation(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            is_norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(1 + 0.3 * noise if is_norm else noise * (0.3 if value.ndim == 1 else value[0].numel() ** -0.5))
    return net


def _attention(theirs: dict[str, Tensor], name: str, kind: str) -> Tensor:
    return torch.cat([theirs[f"{name}.{part}_proj.{kind}"] for part in "qkv"])


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under mmdet's names, in mmdet's order."""
    out: dict[str, Tensor] = {}

    def copy(target: str, source: str) -> None:
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in state:
                out[f"{target}.{kind}"] = state[f"{source}.{kind}"]

    swin, encoder = "model.pixel_level_module.encoder.swin", "model.pixel_level_module.encoder"
    copy("backbone.patch_embed.projection", f"{swin}.embeddings.patch_embeddings.projection")
    copy("backbone.patch_embed.norm", f"{swin}.embeddings.norm")
    for stage in range(4):
        copy(f"backbone.norm{stage}", f"{encoder}.hidden_states_norms.stage{stage + 1}")
        for block in range(2):
            ours, other = f"backbone.stages.{stage}.blocks.{block}", f"{swin}.encoder.layers.{stage}.blocks.{block}"
            attention = f"{ours}.attn.w_msa"
            for kind in ("weight", "bias"):
                out[f"{attention}.qkv.{kind}"] = _attention(state, f"{other}.attention", kind)
            copy(f"{attention}.proj", f"{other}.attention.o_proj")
            table = "relative_position_bias_table"
            out[f"{attention}.{table}"] = state[f"{other}.attention.relative_position_bias.{table}"]
            for a, b in (("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
                copy(f"{ours}.{a}", f"{other}.{b}")
            copy(f"{ours}.ffn.layers.0.0", f"{other}.mlp.fc1")
            copy(f"{ours}.ffn.layers.1", f"{other}.mlp.fc2")
        if stage < 3:
            merge, width = f"{swin}.encoder.layers.{stage}.downsample", 8 * 2**stage
            # theirs: blocks 00, 10, 01, 11 of all channels; mmdet: per channel 00, 01, 10, 11
            order = torch.arange(4 * width).reshape(4, width)[[0, 2, 1, 3]].T.flatten()
            for kind in ("norm.weight", "norm.bias", "reduction.weight"):
                out[f"backbone.stages.{stage}.downsample.{kind}"] = state[f"{merge}.{kind}"][..., order]
    _convert_head(state, out, copy)
    return out


def _convert_head(state, out, copy) -> None:
    pixel, other = "panoptic_head.pixel_decoder", "model.pixel_level_module.decoder"
    for level in range(3):
        copy(f"{pixel}.input_convs.{level}.conv", f"{other}.input_projections.{level}.0")
        copy(f"{pixel}.input_convs.{level}.gn", f"{other}.input_projections.{level}.1")
    for layer in range(2):
        a, b = f"{pixel}.encoder.layers.{layer}", f"{other}.encoder.layers.{layer}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            copy(f"{a}.attentions.0.{part}", f"{b}.self_attn.{part}")
        copy(f"{a}.norms.0", f"{b}.self_attn_layer_norm")
        copy(f"{a}.norms.1", f"{b}.final_layer_norm")
        copy(f"{a}.ffns.0.layers.0.0", f"{b}.fc1")
        copy(f"{a}.ffns.0.layers.1", f"{b}.fc2")
    out[f"{pixel}.level_encoding.weight"] = state[f"{other}.level_embed"]
    for ours, name in (("lateral_convs", "adapter_1"), ("output_convs", "layer_1")):
        copy(f"{pixel}.{ours}.0.conv", f"{other}.{name}.0")
        copy(f"{pixel}.{ours}.0.gn", f"{other}.{name}.1")
    copy(f"{pixel}.mask_feature", f"{other}.mask_projection")
    other = "model.transformer_module"
    for layer in range(4):
        a, b = f"panoptic_head.transformer_decoder.layers.{layer}", f"{other}.decoder.layers.{layer}"
        for kind in ("weight", "bias"):
            out[f"{a}.attentions.0.attn.in_proj_{kind}"] = state[f"{b}.cross_attn.in_proj_{kind}"]
            out[f"{a}.attentions.1.attn.in_proj_{kind}"] = _attention(state, f"{b}.self_attn", kind)
        for index, name in enumerate(("cross_attn", "self_attn")):
            copy(f"{a}.attentions.{index}.attn.out_proj", f"{b}.{name}.out_proj")
        for index, name in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
            copy(f"{a}.norms.{index}", f"{b}.{name}")
        copy(f"{a}.ffns.0.layers.0.0", f"{b}.fc1")
        copy(f"{a}.ffns.0.layers.1", f"{b}.fc2")
    copy("panoptic_head.transformer_decoder.post_norm", f"{other}.decoder.layernorm")
    copy("panoptic_head.query_embed", f"{other}.queries_embedder")
    copy("panoptic_head.query_feat", f"{other}.queries_features")
    copy("panoptic_head.level_embed", f"{other}.level_embed")
    copy("panoptic_head.cls_embed", "class_predictor")
    for index in range(3):
        copy(f"panoptic_head.mask_embed.{2 * index}", f"{other}.decoder.mask_predictor.mask_embedder.{index}.0")


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, Mask2Former]:
    """transformers' network and ours with its weights, in double precision."""
    other = theirs()
    ours = Mask2Former(TINY).double().eval()
    state = converted(other.state_dict())
    missing = ours.state_dict().keys() - state.keys()
    assert all(name.endswith("relative_position_index") for name in missing)
    ours.load_state_dict(state, strict=False)
    return other, ours


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (50, 75)], ids=lambda size: "x".join(map(str, size)))
def test_the_numbers_are_those_of_transformers(pair, size):
    """Sizes that fill whole windows and sizes that do not, in a batch of two."""
    other, ours = pair
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected = other(pixel_values=images)
        classes, masks = ours(images)
    assert classes.std() > 0.1
    assert masks.std() > 0.1
    torch.testing.assert_close(classes, expected.class_queries_logits, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=1e-8, atol=1e-8)


def test_every_weight_counts(pair):
    """A weight that no output hangs on would be a layer that is not wired."""
    _, ours = pair
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    ours.requires_grad_(True)
    classes, masks = ours(images)
    (classes.square().sum() + masks.square().sum()).backward()
    idle = [name for name, value in ours.named_parameters() if value.grad is None or not value.grad.abs().sum()]
    ours.zero_grad()
    assert not idle


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> dict[str, Tensor]:
    return Mask2Former(TINY).state_dict()


def test_a_checkpoint_loads_from_mmdets_layout_and_from_safetensors(tmp_path, state):
    meta = {"CLASSES": ("person", "bicycle"), "mmdet_version": "2.20.0", "epoch": 50, "PALETTE": None}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "b.safetensors"):
        net = load(path, TINY)
        assert not net.training
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_a_checkpoint_that_cannot_be_read_is_refused(tmp_path, state, capsys):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "missing.pth")
    torch.save({"meta": Harmful(), "state_dict": state}, tmp_path / "code.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": np.zeros(3)}))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("code.pth", "junk.pth", "pickle.pth"):
        with pytest.raises(
            UserError, match=rf"{name}: holds more than tensors .* save its 'state_dict' as safetensors"
        ):
            load(tmp_path / name, TINY)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="not a safetensors file"):
        load(tmp_path / "junk.safetensors", TINY)


def test_other_weights_are_refused_by_name(tmp_path, state):
    save_file({**state, "neck.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"neck\.weight does not fit"):
        load(tmp_path / "more.safetensors", TINY)
    save_file({**state, "panoptic_head.cls_embed.bias": torch.zeros(9)}, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match=r"panoptic_head\.cls_embed\.bias does not fit"):
        load(tmp_path / "shape.safetensors", TINY)
