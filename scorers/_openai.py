"""Questions to a vision language model behind an OpenAI-compatible address, many at a time."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image

from diffalign.errors import UserError

from ._http import Caller, NoAnswer, said, secret

T = TypeVar("T")
R = TypeVar("R")
Part = dict[str, Any]
REFUSED = (401, 403, 404, 405)
"""Statuses that are about us and not about one question."""
WORDS = ("yes", "no")


class Endpoint:
    """A model at an address, asked by ``workers`` threads.

    ``budget`` is how many seconds may pass without any answer until questions are given up.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_env: str | None,
        timeout: float,
        budget: float,
        workers: int,
        options: Mapping[str, Any] | None,
    ) -> None:
        if workers < 1:
            raise UserError(f"workers {workers}: at least 1")
        self.caller = Caller(base_url, secret(key_env), timeout, budget)
        self.model, self.workers, self.options = model, workers, dict(options or {})
        self._heard = 0.0

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``function`` of every item, in order, several at a time."""
        self._heard = time.monotonic()
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, items))

    def ask(self, parts: Sequence[Part], **options: Any) -> dict[str, Any]:
        """The model's choice for one message of a user.

        Args:
            options: of the request; those of the scorer go over them, and null takes one out.

        Raises:
            NoAnswer: there is none, or it is no answer of this protocol.
            UserError: the server refuses us: a wrong key, an unknown model or address.
        """
        left = self._heard + self.caller.budget - time.monotonic()
        if left <= 0:
            raise NoAnswer(f"{self.caller.url}: no answer for {self.caller.budget:g} seconds")
        messages = [{"role": "user", "content": list(parts)}]
        body = {"model": self.model, "messages": messages, "temperature": 0, **options, **self.options}
        body = {name: value for name, value in body.items() if value is not None}
        response = self.caller.send("POST", "/chat/completions", budget=left, json=body)
        if response.status_code in REFUSED:
            raise UserError(f"{self.caller.url}: refused: {said(response)}")
        if response.status_code != 200:
            raise NoAnswer(f"{self.caller.url}: {said(response)}")
        self._heard = time.monotonic()
        try:
            choice = response.json()["choices"][0]
            if not isinstance(choice, dict):
                raise TypeError("choice")
            return choice
        except (ValueError, KeyError, IndexError, TypeError):
            raise NoAnswer(f"not an answer: {said(response)}") from None


def words(text: str) -> Part:
    """Text of a message."""
    return {"type": "text", "text": text}


def picture(image: Image.Image, kind: str = "PNG") -> Part:
    """A picture of a message, as a data URL."""
    held = io.BytesIO()
    image.convert("RGB").save(held, format=kind)
    content = base64.b64encode(held.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind.lower()};base64,{content}"}}


def text_of(choice: Mapping[str, Any]) -> str:
    """What the model wrote.

    Raises:
        NoAnswer: nothing.
    """
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise NoAnswer(f"not an answer: no text (finish_reason {choice.get('finish_reason')!r})")
    return text


def yes_probability(choice: Mapping[str, Any]) -> float:
    """P(yes) / (P(yes) + P(no)) of the first token, summed over the spellings among the most likely ones.

    Raises:
        NoAnswer: the server sends no log-probs, or neither word is among them.
    """
    try:
        likely = choice["logprobs"]["content"][0]["top_logprobs"]
        mass = dict.fromkeys(WORDS, 0.0)
        for entry in likely:
            word = entry["token"].strip(" \t\r\n\"'.,*_▁ĠĊ").lower()
            if word in mass:
                mass[word] += math.exp(min(float(entry["logprob"]), 0.0))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise NoAnswer(
            "not an answer: no choices[0].logprobs.content[0].top_logprobs; does the server give them?"
        ) from None
    total = sum(mass.values())
    if not (math.isfinite(total) and total > 0):
        tokens = [str(entry["token"])[:20] for entry in likely[:5]]
        raise NoAnswer(f"neither yes nor no among the most likely tokens {tokens}")
    return mass["yes"] / total
