"""Requests that are repeated until they are answered or their time is up."""

from __future__ import annotations

import os
import random
import time
import weakref
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError

if TYPE_CHECKING:
    import httpx

BUSY = {408, 425, 429}
"""Like all from 500 on: try again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0


class NoAnswer(Exception):
    """The time is up; the text says what was in the way."""


class Caller:
    """A client of one address. Threads may share it."""

    def __init__(self, url: str, token: str | None, timeout: float, budget: float) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise UserError("this scorer asks a server: pip install 'diffalign[web]'") from None
        if not url.startswith(("http://", "https://")):
            raise UserError(f"url {url!r}: expected http:// or https://")
        if timeout <= 0 or budget <= 0:
            raise UserError("timeout and budget: seconds above 0")
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        limits = httpx.Limits(max_connections=None)
        self.url, self.budget, self._failed = url.rstrip("/"), budget, httpx.TransportError
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=10), limits=limits)
        weakref.finalize(self, self._client.close)  # scorers have no end of their own

    def send(self, method: str, path: str, *, budget: float | None = None, **content: Any) -> httpx.Response:
        """The first answer that is neither busy nor broken, errors of ours (4xx) included.

        Args:
            budget: seconds for all attempts and the pauses between them; each is longer than the one before.

        Raises:
            NoAnswer: the budget is spent.
        """
        end = time.monotonic() + (self.budget if budget is None else budget)
        pause = FIRST_PAUSE
        while True:
            wanted = 0.0
            try:
                response = self._client.request(method, f"{self.url}{path}", **content)
            except self._failed as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code not in BUSY and response.status_code < 500:
                    return response
                reason = said(response)
                wanted = _seconds(response.headers.get("retry-after", ""))
            wait = max(wanted, pause * random.uniform(0.5, 1.5))  # clients that failed together come back apart
            if time.monotonic() + wait > end:
                raise NoAnswer(f"{self.url}: {reason}")
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)


def said(response: httpx.Response) -> str:
    """The status of an answer and the beginning of its text."""
    return " ".join(f"{response.status_code} {response.reason_phrase}: {response.text[:300]}".split())


def secret(variable: str | None) -> str | None:
    """What an environment variable holds: secrets stay out of configs and of what runs write.

    Raises:
        UserError: it is not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UserError(f"environment variable {variable} is not set; it must hold the token or key of the server")
    return os.environ[variable]


def _seconds(text: str) -> float:
    """Of a ``Retry-After``, which may also be a date."""
    return float(text) if text.isdigit() else 0.0
