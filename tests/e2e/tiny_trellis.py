"""A tiny random TRELLIS in the published layout: 8^3 grids, latents of 3 x 4^3, images of 28 x 28."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import trellis_reference as ref

FLOW = ref.IMAGE_LARGE | {
    **{"resolution": 4, "in_channels": 3, "out_channels": 3, "model_channels": 32, "cond_channels": 16},
    **{"num_blocks": 2, "num_heads": 2, "mlp_ratio": 2},
}
SMALL = {"latent_channels": 3, "num_res_blocks": 1, "num_res_blocks_middle": 1}
ENCODER, DECODER = ref.ENCODER | SMALL | {"channels": [4, 8]}, ref.DECODER | SMALL | {"channels": [8, 4]}
NETS = {  # in the order of their seeds
    "ss_flow_img_dit_L_16l8_fp16": ("SparseStructureFlowModel", FLOW, ref.flow_table(FLOW)),
    "ss_enc_conv3d_16l8_fp16": ("SparseStructureEncoder", ENCODER, ref.vae_table(ENCODER)),
    "ss_dec_conv3d_16l8_fp16": ("SparseStructureDecoder", DECODER, ref.vae_table(DECODER)),
}
INDEX = {
    "name": "TrellisImageTo3DPipeline",
    "args": {
        "models": {
            "sparse_structure_decoder": "ckpts/ss_dec_conv3d_16l8_fp16",
            "sparse_structure_flow_model": "ckpts/ss_flow_img_dit_L_16l8_fp16",
            "slat_flow_model": "ckpts/slat_flow_img_dit_L_64l8p2_fp16",
        },
        "sparse_structure_sampler": {
            "name": "FlowEulerGuidanceIntervalSampler",
            "args": {"sigma_min": 1e-5},
            "params": {"steps": 25, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0},
        },
        "image_cond_model": "dinov2",
    },
}


def write_index(folder: Path, **changes: Any) -> None:
    args = {name: value for name, value in (INDEX["args"] | changes).items() if value is not None}
    (folder / "pipeline.json").write_text(json.dumps(INDEX | {"args": args}))


def seeded(seed: int, make: Callable[[], torch.nn.Module]) -> Any:
    """A model whose every parameter is random, zeros and ones of the initialisation too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for value in model.parameters():
            value.data = torch.randn_like(value) / 4
    return model


def write_dino(out: Path, width: int = 16) -> None:
    """DINOv2 with registers: 4 patches, 4 registers, one class token."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 28}
    config = Dinov2WithRegistersConfig(**sizes, patch_size=14, num_register_tokens=4)
    seeded(5, lambda: Dinov2WithRegistersModel(config)).save_pretrained(out)


def write(out: Path) -> None:
    """The image-conditioned pipeline."""
    for seed, (name, (kind, args, table)) in enumerate(NETS.items(), 1):
        ref.write(out / "ckpts" / name, kind, args, table, seed)
    file = out / "ckpts" / "ss_flow_img_dit_L_16l8_fp16.safetensors"
    positions = ref.positions(FLOW["resolution"], FLOW["model_channels"]).float()
    save_file(load_file(file) | {"pos_emb": positions}, file)
    write_dino(out / "dinov2")
    write_index(out)
