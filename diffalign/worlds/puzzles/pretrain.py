"""Train the shipped weights of the puzzles world from nothing: a tiny Llama with transformers' own classes.

    python -m diffalign.worlds.puzzles.pretrain --out runs/puzzles        # about half an hour on one CPU core

A character-level chat model on the train split. A share of its answers is wrong in plausible ways, as data from the
web is: sampling from the model repeats those mistakes, which is what preference alignment has to take out again.
The result is a transformers folder that stock ``AutoModelForCausalLM.from_pretrained`` loads.
"""

from __future__ import annotations

import argparse
import string
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.worlds.puzzles.prompts import PAIRS, TASKS, prompts, solve

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the shipped weights."""

    seed: int = 0
    hidden: int = 96
    layers: int = 4
    heads: int = 4
    mistakes: float = 0.3
    steps: int = 6000
    batch: int = 256
    lr: float = 2e-3
    warmup: int = 200


def make_tokenizer() -> Any:
    """One token per ASCII character, one per role; with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "<|unknown|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(tokenizer: Any, recipe: Recipe) -> Any:
    """A random Llama of about 0.45 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def mistake(tag: str, prompt: str, answer: str, rng: np.random.Generator) -> str:
    """A wrong answer of the kind people make."""
    if tag in ("add", "subtract"):
        wrong = str(max(0, int(answer) + int(rng.choice([-10, -1, 1, 10]))))
    elif tag == "maximum":
        wrong = str(rng.choice([n for n in prompt.split()[1:] if n != answer] or [answer[::-1]]))
    elif tag == "close" and rng.random() < 0.5:
        wrong = answer[:-1] if rng.random() < 0.5 else answer + str(rng.choice(list(PAIRS.values())))
    else:
        i, j = sorted(rng.choice(len(answer), 2, replace=False))
        wrong = answer[:i] + answer[j] + answer[i + 1 : j] + answer[i] + answer[j + 1 :]
    return wrong if wrong != answer else answer[:-1]


def _examples(tokenizer: Any, recipe: Recipe) -> tuple[list[list[str]], dict[str, int]]:
    """The train prompts of every task, and the id of every character."""
    return [[m["prompt"] for m in prompts("train", tag)] for tag in TASKS], tokenizer.get_vocab()


def _batch(pools: list[list[str]], ids: dict[str, int], recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Ids (B, L) and labels (B, L), -100 outside the answer; tasks in equal shares, some answers wrong."""
    rows, labels = [], []
    end, user, assistant = (ids[name] for name in ("<|end|>", "<|user|>", "<|assistant|>"))
    for index in range(recipe.batch):
        pool = pools[index % len(pools)]
        prompt = pool[rng.integers(len(pool))]
        tag, answer = solve(prompt)
        if rng.random() < recipe.mistakes:
            answer = mistake(tag, prompt, answer, rng)
        question = [user, *(ids[c] for c in prompt), end, assistant]
        reply = [*(ids[c] for c in answer), end]
        rows.append(question + reply)
        labels.append([-100] * len(question) + reply)
    width = max(map(len, rows))
    padded = [
        [row + [fill] * (width - len(row)) for row in of] for of, fill in ((rows, ids["<|pad|>"]), (labels, -100))
    ]
    return tuple(torch.tensor(rows) for rows in padded)


def pretrain(out: Path, recipe: Recipe) -> Path:
    """Train and write the folder; a few hundred bytes of log per thousand steps."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, recipe)
    pools, ids = _examples(tokenizer, recipe)
    rng = np.random.default_rng(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.05)

    def factor(step: int) -> float:
        return min((step + 1) / recipe.warmup, max(0.02, 1 - step / recipe.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    started, running = time.perf_counter(), 0.0
    for step in range(recipe.steps):
        rows, labels = _batch(pools, ids, recipe, rng)
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        running += loss.item()
        if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
            print(f"{step + 1} loss {running / 250:.4f} {time.perf_counter() - started:.0f} s", flush=True)
            running = 0.0
            model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="train the weights of the puzzles world")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--batch", type=int, default=Recipe().batch)
    given = parser.parse_args()
    print(pretrain(given.out, Recipe(steps=given.steps, batch=given.batch)))


if __name__ == "__main__":
    main()
