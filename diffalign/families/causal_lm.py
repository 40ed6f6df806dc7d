"""Causal language models from a transformers folder or the Hub: chat template, completion masks, sampling by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.foreign import foreign_files, quiet, reading_lora, tensor_digest
from diffalign.networks import Loading
from diffalign.types import Decoding, Request

Turn = Mapping[str, str]
"""``{"role": ..., "content": ...}``."""


class Encoded(NamedTuple):
    """One prompt with one completion."""

    ids: list[int]
    counts: list[int]
    """1 for the tokens of the policy's own turns, 0 for the prompt and for turns of the user, a tool or a system."""


class Family:
    """Any decoder that ``AutoModelForCausalLM`` loads; ``net`` is the model, the tokenizer is frozen."""

    name: ClassVar[str] = "causal_lm"
    modality: ClassVar[Literal["text"]] = "text"
    net_name: ClassVar[str] = "model"
    lora_file: ClassVar[str] = "adapter_model.safetensors"
    index_file: ClassVar[str] = "config.json"
    blocks: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    def __init__(self, net: nn.Module, tokenizer: Any, source: str, device: torch.device) -> None:
        self.net = net.requires_grad_(False).eval().to(device)
        self.tokenizer = tokenizer
        self.source = source
        self.device = device
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.path: the tokenizer of {source} has no end token")
        self.networks = (self.net,)
        self.pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def load(cls, path: str, device: torch.device, loading: Loading = Loading()) -> Family:  # noqa: B008
        """Load from a transformers folder or Hub id, safetensors only, no code from the files."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if loading.parts:
            raise UserError("model.parts: a language model has none")
        if path.startswith((".", "/")) and not Path(path, "config.json").is_file():
            raise UserError(f"model.path: {path} holds no config.json; give a transformers folder or a Hub id")
        with foreign_files(f"model.path: cannot load {path} as a causal language model"), quiet():
            quant = loading.quantisation("transformers")
            options = {} if quant is None else {"quantization_config": quant, "device_map": {"": device}}
            net: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=loading.torch_dtype, use_safetensors=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(path)
        if any(p.is_meta for p in net.parameters()):
            raise UserError(f"model.path: {path} lacks weights; get the folder again")
        return cls(net, tokenizer, path, device)

    @property
    def fingerprint(self) -> str:
        """A digest of the tokenizer: two models with equal fingerprints encode alike."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return tensor_digest((), f"{vocabulary}|{self.tokenizer.chat_template}")[:16]

    @cached_property
    def breaks(self) -> Tensor:
        """Ids of the tokens with a line break in them."""
        texts = ((index, self.tokenizer.decode([index])) for index in range(len(self.tokenizer)))
        return torch.tensor([index for index, text in texts if "\n" in text])

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the model was made for, if it says so."""
        return getattr(self.net.config, "max_position_embeddings", None)

    # --- text -> tokens -----------------------------------------------------------------------------------------

    def encode(self, prompt: str | Sequence[Turn], completion: str | Sequence[Turn]) -> Encoded:
        """Token ids of a prompt and its completion, and which of them count.

        With a chat template a plain prompt is a user turn and a plain completion an assistant turn; of a multi-turn
        completion only assistant turns count, each with its end token. Without a template both must be plain text,
        and the end token follows the completion.

        Raises:
            UserError: a conversation for a model without a chat template, or a template that rewrites earlier turns.
        """
        if self.tokenizer.chat_template is None:
            if not isinstance(prompt, str) or not isinstance(completion, str):
                raise UserError(f"{self.source} has no chat template, so prompts and completions must be plain text")
            head = self.tokenizer(prompt)["input_ids"]
            tail = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            tail = [*tail, self.tokenizer.eos_token_id]
            return Encoded(head + tail, [0] * len(head) + [1] * len(tail))
        turns = _turns(prompt, "user")
        answer = _turns(completion, "assistant")
        ids = self._template([*turns, *answer])
        counts = [0] * len(ids)
        for end in range(len(turns) + 1, len(turns) + len(answer) + 1):
            so_far = [*turns, *answer][:end]
            if so_far[-1]["role"] != "assistant":
                continue
            before, after = self._template(so_far[:-1], reply=True), self._template(so_far)
            if ids[: len(before)] != before or ids[: len(after)] != after:
                raise UserError(
                    f"the chat template of {self.source} rewrites earlier turns; its turns cannot be masked"
                )
            counts[len(before) : len(after)] = [1] * (len(after) - len(before))
        return Encoded(ids, counts)

    def encode_prompt(self, prompt: str | Sequence[Turn]) -> list[int]:
        """Token ids up to where the model answers."""
        if self.tokenizer.chat_template is not None:
            return self._template(_turns(prompt, "user"), reply=True)
        if not isinstance(prompt, str):
            raise UserError(f"{self.source} has no chat template, so prompts must be plain text")
        return self.tokenizer(prompt)["input_ids"]

    def _template(self, turns: Sequence[Turn], reply: bool = False) -> list[int]:
        return self.tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], add_generation_prompt=reply, tokenize=True, return_dict=False
        )

    # --- tokens -> logits ---------------------------------------------------------------------------------------

    def forward(
        self,
        net: nn.Module,
        ids: Tensor,
        attention: Tensor | None,
        positions: Tensor | None,
        keep: int,
        values: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Next-token logits (N, keep, V) at the last ``keep`` positions of ``ids`` (N, L), and their values (N, keep).

        Args:
            attention: (N, L) 1 for tokens, 0 for padding; None when ``positions`` tells packed sequences apart.
            positions: (N, L) position of every token in its own sequence, None for ``0 .. L-1``.
            values: also run the value head.
        """
        out = net(
            input_ids=ids, attention_mask=attention, position_ids=positions, logits_to_keep=keep, use_cache=False,
            output_hidden_states=values,
        )  # fmt: skip
        if not values:
            return out.logits, None
        head: Any = net.value_head
        return out.logits, head(out.hidden_states[-1][:, -keep:])[..., 0]

    def add_value_head(self) -> None:
        """A linear value of every position, 0 at first, which trains with the policy and is not exported."""
        width: int = self.net.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        head = nn.Linear(width, 1, device=self.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.net.value_head = head

    # --- generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, net: nn.Module, requests: Sequence[Request], decoding: Decoding) -> list[str]:
        """One completion per request. The randomness of each comes from its own seed, whatever the batch."""
        prompts = [self.encode_prompt(request.prompt) for request in requests]
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts], device=self.device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        written: list[Tensor] = []
        done = torch.zeros(len(requests), dtype=torch.bool, device=self.device)
        step, cache = ids, None
        for _ in range(self._room(width, decoding)):
            positions = (attention.cumsum(-1) - 1).clamp_min(0)[:, -step.shape[1] :]
            out = net(
                input_ids=step, attention_mask=attention, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            cache = out.past_key_values
            token = sample_token(out.logits[:, -1].float(), decoding, generators)
            token = torch.where(done, self.pad, token)
            written.append(token)
            done = done | (token == self.tokenizer.eos_token_id)
            if done.all():
                break
            step = token[:, None]
            attention = torch.cat([attention, torch.ones_like(step)], 1)
        return [self._text(row) for row in torch.stack(written, 1).tolist()]

    def _room(self, width: int, decoding: Decoding) -> int:
        room = decoding.max_tokens if self.max_tokens is None else min(decoding.max_tokens, self.max_tokens - width)
        if room <= 0:
            raise UserError(
                f"a prompt of {width} tokens leaves no room for an answer: {self.source} reads {self.max_tokens}"
            )
        return room

    def _text(self, row: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        return self.tokenizer.decode(row[: row.index(end)] if end in row else row, skip_special_tokens=True)

    # --- weights ------------------------------------------------------------------------------------------------

    def save_lora(self, folder: Path, net: nn.Module) -> None:
        """Write a PEFT adapter folder, which stock ``PeftModel.from_pretrained(base, folder)`` reads."""
        with quiet():
            net.save_pretrained(folder)  # type: ignore[operator]

    def save_net(self, folder: Path, net: nn.Module) -> None:
        """Write model and tokenizer as transformers reads them."""
        state = {name: value for name, value in net.state_dict().items() if not name.startswith("value_head.")}
        with quiet():
            net.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    def load_lora(self, folder: Path) -> None:
        """Put a PEFT adapter on the network."""
        from safetensors import safe_open

        with reading_lora(folder, self.lora_file, self.name, self.net) as wanted, quiet():
            with safe_open(folder / self.lora_file, framework="pt") as file:
                wanted += file.keys()
            net: Any = self.net
            renamings = net._weight_conversions  # saving undoes them, and an adapter's would spoil the model's names
            net.load_adapter(str(folder))
            net._weight_conversions = renamings


def _turns(content: str | Sequence[Turn], role: str) -> list[Turn]:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def sample_token(logits: Tensor, decoding: Decoding, generators: Sequence[torch.Generator]) -> Tensor:
    """One token (N,) per row of next-token logits (N, V), by inverting the cumulative distribution.

    A row draws one uniform number of its own generator, so that it does not depend on its neighbours.
    """
    if decoding.temperature == 0:
        return logits.argmax(-1)
    p = (logits / decoding.temperature).softmax(-1)
    p, order = p.sort(dim=-1, descending=True, stable=True)
    mass = p.cumsum(-1)
    nucleus = mass - p < decoding.top_p
    u = torch.stack([torch.rand((), generator=g) for g in generators]).to(p)
    below = (mass < (u * (p * nucleus).sum(-1))[:, None]).sum(-1, keepdim=True)
    last = nucleus.sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(below, last))[:, 0]
