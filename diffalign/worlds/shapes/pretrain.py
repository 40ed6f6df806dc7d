"""Train the shipped weights of the shapes world from nothing: a tiny SD3 with diffusers' and transformers' own classes.

    python -m diffalign.worlds.shapes.pretrain --out runs/pretrain            # about forty minutes on two CPU cores

Three stages, each resumable: a VAE on rendered images, a cache of its latents, and the transformer together with two
small CLIP text encoders on flow matching. Only prompts of the train split are ever rendered. The result is a diffusers
folder that stock ``StableDiffusion3Pipeline.from_pretrained(out, text_encoder_3=None, tokenizer_3=None)`` loads; call
it with ``max_sequence_length=0``, since there is no T5 and the zero tokens that stand in for it were never seen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.worlds.shapes.judge import judge
from diffalign.worlds.shapes.prompts import COLORS, SHAPES, TASKS, Metadata, all_prompts, prompts
from diffalign.worlds.shapes.render import SIZE, render_prompts

TOKENS = 16  # the longest prompt of the world needs 12
LATENT = (4, SIZE // 4, SIZE // 4)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the shipped weights. ``share`` is the sampling weight of each task."""

    seed: int = 0
    vae_steps: int = 3600
    vae_batch: int = 64
    vae_lr: float = 2e-3
    vae_share: tuple[float, ...] = (1.0, 1.2, 3.0, 1.0, 1.2, 1.2)
    images: int = 96_000
    share: tuple[float, ...] = (0.6, 0.9, 1.2, 0.8, 2.0, 2.0)
    steps: int = 9_000
    decay: int = 2_000
    batch: int = 128
    lr: float = 3e-3
    warmup: int = 200
    empty_prompt: float = 0.1


def _tokenizer() -> Any:
    """A CLIP tokenizer in which every word of the world is one token and any other ASCII text still encodes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = sorted({w for m in all_prompts() for w in m["prompt"].split()} | set(COLORS) | set(SHAPES))
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    characters = [chr(c) for c in range(33, 127)]
    alphabet = [*characters, *(f"{c}</w>" for c in characters)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(words)] * 2, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    build: Any = CLIPTokenizer  # its annotations predate the vocabulary and merges it takes
    return build(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS)


def _text_encoder(hidden: int, heads: int, tokenizer: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def _diffusers() -> Any:
    import diffusers

    return diffusers


def _vae() -> Any:
    return _diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT[0],
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _transformer(text_width: int) -> Any:
    return _diffusers().SD3Transformer2DModel(
        sample_size=LATENT[1],
        patch_size=2,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=text_width,
        caption_projection_dim=128,
        pooled_projection_dim=text_width,
        pos_embed_max_size=LATENT[1] // 2,
    )


class Model(nn.Module):
    """What is trained jointly in the last stage: the two text encoders and the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = _tokenizer()
        self.text_encoder = _text_encoder(96, 4, self.tokenizer)
        self.text_encoder_2 = _text_encoder(32, 2, self.tokenizer)
        self.transformer = _transformer(96 + 32)

    def ids(self, texts: list[str]) -> Tensor:
        """(N, TOKENS) token ids, padded as the pipeline pads."""
        out = self.tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return out.input_ids

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Velocity (N, 4, 8, 8) at time ``t`` (N,) in [0, 1] for token ids (N, TOKENS)."""
        outputs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        states = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        pooled = torch.cat([o.text_embeds for o in outputs], -1)
        return self.transformer(x_t, states, pooled, t * 1000, return_dict=False)[0]


def _pick(share: tuple[float, ...], n: int, generator: torch.Generator) -> list[Metadata]:
    """``n`` train prompts: a task by its share, then a prompt of that task uniformly."""
    pools = [prompts("train", task) for task in TASKS]
    tasks = torch.multinomial(torch.tensor(share), n, True, generator=generator).tolist()
    draws = torch.rand(n, generator=generator).tolist()
    return [pools[task][int(u * len(pools[task]))] for task, u in zip(tasks, draws, strict=True)]


def _save_atomically(state: Any, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _ema_update(average: nn.Module, model: nn.Module, step: int, ceiling: float) -> None:
    decay = min(ceiling, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


class _Log:
    """Prints a line and appends it to a JSONL file."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.perf_counter()

    def __call__(self, **values: Any) -> None:
        values = {"seconds": round(time.perf_counter() - self.start, 1), **values}
        line = json.dumps(values)
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def train_vae(out: Path, recipe: Recipe) -> None:
    """Stage 1. L1 + L2, five times heavier on saturated pixels (objects are a sixth of an image), plus a weak KL."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    vae = _vae()
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), recipe.vae_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    log = _Log(out / "vae.jsonl")
    for step in range(recipe.vae_steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / recipe.vae_steps))
        optimizer.param_groups[0]["lr"] = recipe.vae_lr * min(1, (step + 1) / 100) * decay
        x = render_prompts(_pick(recipe.vae_share, recipe.vae_batch, generator), generator) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample
        error = y.float() - x
        weight = 1 + 2 * (x.amax(1, True) - x.amin(1, True))
        kl = posterior.kl().mean() / math.prod(LATENT)
        loss = (weight * (error.abs() + 2 * error.square())).mean() + 1e-3 * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _ema_update(average, vae, step, 0.998)
        if step % 200 == 0 or step == recipe.vae_steps - 1:
            psnr = -10 * math.log10(error.square().mean().item() / 4)
            log(step=step, loss=loss.item(), psnr=psnr, kl=kl.item())
    average.save_pretrained(out / "vae")


@torch.no_grad()
def cache_latents(out: Path, recipe: Recipe) -> None:
    """Stage 2. Render, encode once, and write the scale and shift that make the latents unit normal."""
    vae = _diffusers().AutoencoderKL.from_pretrained(out / "vae")
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    means, logvars, texts = [], [], []
    for _ in range(math.ceil(recipe.images / 500)):
        batch = _pick(recipe.share, 500, generator)
        posterior = vae.encode(render_prompts(batch, generator) * 2 - 1).latent_dist
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
        texts += [m["prompt"] for m in batch]
    mean, logvar = torch.cat(means), torch.cat(logvars)
    sampled = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
    vae.register_to_config(scaling_factor=1 / sampled.std().item(), shift_factor=sampled.mean().item())
    vae.save_pretrained(out / "vae")
    unique = sorted(set(texts))
    index = {text: i for i, text in enumerate(unique)}
    prompt = torch.tensor([index[t] for t in texts])
    (out / "prompts.json").write_text(json.dumps(unique), encoding="utf-8")
    save_file({"mean": mean, "logvar": logvar, "prompt": prompt}, out / "latents.safetensors")


def _optimizers(model: Model, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (arXiv:2502.16982 scaling) for the matrices of the transformer blocks, AdamW for everything else."""
    blocks = dict(model.transformer.transformer_blocks.named_parameters())
    matrices = [p for name, p in blocks.items() if p.ndim == 2 and "norm" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


@torch.no_grad()
def _evaluate(out: Path, model: Model, images: int, guidance: float) -> dict[str, float]:
    """Held-out score through the stock pipeline, equal shares of the six tasks."""
    pools = [prompts("heldout", task) for task in TASKS]
    metadata = [pool[i % len(pool)] for pool in pools for i in range(images // len(TASKS))]
    pipe = pipeline(out, model)
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe(
        [m["prompt"] for m in metadata],
        num_inference_steps=20,
        guidance_scale=guidance,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    verdicts = judge(pixels, metadata)
    by_task = {t: [v.correct for v, m in zip(verdicts, metadata, strict=True) if m["tag"] == t] for t in TASKS}
    scores = {t: sum(values) / len(values) for t, values in by_task.items()}
    return {**scores, "average": sum(scores.values()) / len(scores)}


def train_transformer(out: Path, recipe: Recipe, checkpoint_every: int = 500, evaluate_every: int = 1500) -> None:
    """Stage 3. Flow matching: t logit-normal, target noise - x0, one caption in ten empty; EMA weights are kept."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(recipe.seed)
    model = Model()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizers = _optimizers(model, recipe.lr)
    checkpoint = out / "transformer.ckpt"
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    data = load_file(out / "latents.safetensors")
    ids = model.ids([*json.loads((out / "prompts.json").read_text(encoding="utf-8")), ""])
    vae_config = json.loads((out / "vae" / "config.json").read_text(encoding="utf-8"))
    scale, shift = vae_config["scaling_factor"], vae_config["shift_factor"]
    log = _Log(out / "transformer.jsonl")
    for step in range(first, recipe.steps):
        lr = recipe.lr * min(1, (step + 1) / recipe.warmup, (recipe.steps - step) / recipe.decay)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = lr
        generator = torch.Generator().manual_seed((recipe.seed << 32) + step)
        rows = torch.randint(len(data["mean"]), (recipe.batch,), generator=generator)
        noise, jitter = torch.randn(2, recipe.batch, *LATENT, generator=generator)
        x0 = (data["mean"][rows] + (0.5 * data["logvar"][rows]).exp() * jitter - shift) * scale
        t = torch.randn(recipe.batch, generator=generator).sigmoid()
        empty = torch.rand(recipe.batch, generator=generator) < recipe.empty_prompt
        batch_ids = ids[torch.where(empty, len(ids) - 1, data["prompt"][rows])]
        x_t = torch.lerp(x0, noise, t[:, None, None, None])
        # the fused CPU attention is slower than plain matrix products for 32 tokens
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = model(x_t, t, batch_ids)
        loss = (velocity.float() - (noise - x0)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        _ema_update(average, model, step, 0.999)
        done = step + 1
        if done % 50 == 0:
            log(step=done, samples=done * recipe.batch, loss=loss.item(), grad_norm=norm.item(), lr=lr)
        if done % checkpoint_every == 0 or done == recipe.steps:
            states = [o.state_dict() for o in optimizers]
            weights = {"model": model.state_dict(), "average": average.state_dict()}
            _save_atomically({"step": done, **weights, "optimizers": states}, checkpoint)
        if done % evaluate_every == 0 or done == recipe.steps:
            log(step=done, samples=done * recipe.batch, heldout=_evaluate(out, average, 192, 3.0))


def pipeline(out: Path, model: Model, dtype: torch.dtype = torch.float32) -> Any:
    """The stock SD3 pipeline over a trained model and the VAE of ``out``.

    The text encoders are rounded to ``dtype`` but stay float32: transformers loads what a file holds, diffusers loads
    float32, and the two have to agree when nobody names a type.
    """
    diffusers = _diffusers()
    vae = diffusers.AutoencoderKL.from_pretrained(out / "vae").to(dtype)
    vae.register_to_config(_name_or_path="")  # or the shipped config would name this machine's folder
    return diffusers.StableDiffusion3Pipeline(
        transformer=model.transformer.to(dtype),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=model.text_encoder.to(dtype).float(),
        tokenizer=model.tokenizer,
        text_encoder_2=model.text_encoder_2.to(dtype).float(),
        tokenizer_2=model.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def save_weights(out: Path, folder: Path) -> None:
    """Stage 4. Write the averaged weights of the newest checkpoint as a bfloat16 diffusers folder."""
    model = Model()
    state = torch.load(out / "transformer.ckpt", weights_only=True)
    model.load_state_dict(state["average"])
    pipeline(out, model.eval(), torch.bfloat16).save_pretrained(folder, safe_serialization=True)


def main() -> None:
    """Run whatever stage is not finished yet; ``--steps`` and ``--vae-steps`` shorten a trial run."""
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="working folder: checkpoints, latents, curves")
    parser.add_argument("--weights", type=Path, help="where to write the diffusers folder (default: OUT/weights)")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--vae-steps", type=int, default=default.vae_steps)
    parser.add_argument("--images", type=int, default=default.images)
    args = parser.parse_args()
    recipe = Recipe(steps=args.steps, vae_steps=args.vae_steps, images=args.images)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "recipe.json").write_text(json.dumps(asdict(recipe)), encoding="utf-8")
    if not (args.out / "vae").is_dir():
        train_vae(args.out, recipe)
    if not (args.out / "latents.safetensors").is_file():
        cache_latents(args.out, recipe)
    train_transformer(args.out, recipe)
    save_weights(args.out, args.weights or args.out / "weights")


if __name__ == "__main__":
    main()
