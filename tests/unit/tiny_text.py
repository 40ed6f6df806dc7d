"""A random Llama of a few thousand parameters, as a folder in the published format."""

from pathlib import Path

import torch


def llama(folder: Path) -> Path:
    """Write it to a folder, with the tokenizer and chat template of the puzzles world."""
    from diffalign.worlds.puzzles.pretrain import Recipe, make_model, make_tokenizer

    tokenizer = make_tokenizer()
    net = make_model(tokenizer, Recipe(hidden=16, layers=2, heads=2))
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
