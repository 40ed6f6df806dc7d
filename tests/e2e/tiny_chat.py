"""Random language models of some ten thousand parameters as prompt encoders, with tokenizers that have chat templates.

Their vocabulary is learned from the texts given, so that a word of those is one token; any other text is bytes.
"""

import json
from collections.abc import Sequence
from typing import Any

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
MISTRAL = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
IMAGE = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")

# With what the published ones do that shows in a prompt: the answer begins with an empty thought unless it is wanted.
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for m in messages %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def _learned(texts: Sequence[str], special: Sequence[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    found = json.loads(bpe.to_str())["model"]
    return {"vocab": found["vocab"], "merges": [tuple(merge) for merge in found["merges"]]}


def qwen_tokenizer(texts: Sequence[str]) -> Any:
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(
        **_learned(texts, QWEN), extra_special_tokens=list(QWEN[1:3]), chat_template=QWEN_TEMPLATE, padding_side="right"
    )


def pixtral_processor(texts: Sequence[str]) -> Any:
    """The Mistral tokenizer inside the processor that carries the chat template; it pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(**_learned(texts, (*MISTRAL, *IMAGE))))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    special = [*MISTRAL[4:], *IMAGE]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, extra_special_tokens=special, padding_side="left", **tokens
    )
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=MISTRAL_TEMPLATE)


SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}


def qwen3(tokenizer: Any, layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer), num_hidden_layers=layers, head_dim=4, initializer_range=0.2, **SIZES
    )
    return Qwen3ForCausalLM(config)


def mistral3(processor: Any, layers: int) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(
        vocab_size=len(processor.tokenizer), num_hidden_layers=layers, head_dim=4, initializer_range=0.2, **SIZES
    )
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    ids = {"image_token_index": processor.image_token_id}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, **ids))


def qwen25_vl(tokenizer: Any, layers: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rotary = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "rope_parameters": rotary, **SIZES}
    text |= {"initializer_range": 0.2}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
