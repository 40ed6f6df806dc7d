"""A small CLIP for the shapes world, in PickScore's published format: a scorer that learned, and may be wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.nn import functional as F

from diffalign.worlds import load_prompts
from diffalign.worlds.shapes import render

WEIGHTS = Path(render.__file__).parent / "weights"
WIDTH = 128


def network() -> torch.nn.Module:
    """About a million parameters; 32x32 pictures in patches of 8."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    tokens = {"vocab_size": 267, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPModel(
        CLIPConfig(
            text_config={**tower, **tokens, "num_hidden_layers": 2},
            vision_config={**tower, "num_hidden_layers": 3, "image_size": render.SIZE, "patch_size": 8},
            projection_dim=WIDTH,
        )
    )


def make(out: Path, steps: int = 500, batch: int = 128, seed: int = 0) -> float:
    """Train on rendered pictures of training prompts and save; the share of a last batch that find their prompt."""
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    words = AutoTokenizer.from_pretrained(str(WEIGHTS / "tokenizer"))
    prompts = load_prompts("shapes", "train")
    net = network().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    found = 0.0
    for _ in range(steps):
        chosen = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)[:batch].tolist()]
        pixels = (render.render_prompts(chosen, generator).clamp(0, 1) - MEAN) / STD
        tokens = words([m["prompt"] for m in chosen], padding=True, return_tensors="pt")
        logits = net(pixel_values=pixels, **tokens).logits_per_image
        own = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        found = (logits.argmax(1) == own).float().mean().item()
    net.eval().save_pretrained(out)
    shutil.copytree(WEIGHTS / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    return found


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
