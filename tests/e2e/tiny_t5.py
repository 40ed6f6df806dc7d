"""A random T5 encoder of a few thousand parameters and a tokenizer of letters, in the published classes."""

import string
from typing import Any


def make() -> tuple[Any, Any]:
    """Encoder of width 16, tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = T5TokenizerFast(vocab=[*special, ("▁", -2.0), *letters], extra_ids=0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)
    return T5EncoderModel(config), tokenizer
