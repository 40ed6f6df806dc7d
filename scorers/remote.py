"""A scorer that `diffalign serve` runs elsewhere: in another environment, on another machine, for many at once."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign import wire
from diffalign.errors import UserError, nearest
from diffalign.scoring import Failure, Outcome, Sample, Scorer

from ._http import Caller, NoAnswer, said, secret

REFUSED = (400, 401, 403, 404, 415, 422)


def build(
    url: str,
    scorer: str,
    token_env: str | None = None,
    timeout: float = 60.0,
    budget: float = 600.0,
    batch: int = 256,
) -> Scorer:
    """The scorer that a reward server has under the label ``scorer``.

    Args:
        token_env: environment variable with the server's token.
        timeout: seconds that one request may take.
        budget: seconds without any outcome after which the items of a call are failures (``remote`` or ``timeout``).
            A retry after a lost answer scores nothing twice.
        batch: items per request, at most; those of a comparing scorer stay together.

    Raises:
        UserError: the server cannot be reached within the budget, refuses us, speaks another version, or has no such
            scorer.
    """
    if batch < 1:
        raise UserError(f"batch {batch}: at least 1")
    caller = Caller(url, secret(token_env), timeout + 10, budget)  # the server answers after `timeout` by itself
    try:
        response = caller.send("GET", "/health")
    except NoAnswer as error:
        raise UserError(f"no answer from {error}") from None
    _check(caller, response)
    try:
        health = response.json()
        version, scorers, limits = health["version"], health["scorers"], health["limits"]
        if version != wire.VERSION:
            raise UserError(f"{caller.url}: speaks version {version} of the protocol, not {wire.VERSION}")
        if scorer not in scorers:
            raise UserError(f"{caller.url}: has no scorer {scorer!r}{nearest(scorer, scorers)}")
        found = scorers[scorer]
        accepts, together = frozenset(found["accepts"]), bool(found["together"])
        items = int(limits["items"]) if together else min(batch, int(limits["items"]))
        return _Remote(caller, scorer, accepts, together, timeout, items, int(limits["bytes"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{caller.url}: is no reward server") from None


def _check(caller: Caller, response: Any) -> None:
    """Raises: UserError: an answer that asking again does not change."""
    if response.status_code in REFUSED:
        raise UserError(f"{caller.url}: refused: {said(response)}")
    if response.status_code != 200:
        raise UserError(f"{caller.url}: is no reward server: {said(response)}")


@dataclass(frozen=True, slots=True)
class _Remote:
    caller: Caller
    scorer: str
    accepts: frozenset[str]
    together: bool
    timeout: float
    items: int
    size: int

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        parcels: dict[int, wire.Parcel] = {}
        name = uuid.uuid4().hex  # keys are new for every call and the same for every retry of it
        for n, sample in enumerate(samples):
            try:
                parcels[n] = wire.parcel(f"{name}-{n}", sample)
            except UserError as error:
                outcomes[n] = Failure("input", str(error))
        lost: Failure | None = None
        for request in self._requests(parcels):
            if len(request) > self.items or _size(request) > self.size:
                outcomes |= dict.fromkeys(request, Failure("input", "larger than the server takes"))
                continue
            if lost is None:  # else the server had its time
                answers, lost = self._ask(request)
                outcomes |= answers
            if lost is not None:
                outcomes |= {n: lost for n in request if n not in outcomes}
        return [outcomes[n] for n in range(len(samples))]

    def _requests(self, parcels: dict[int, wire.Parcel]) -> Iterator[dict[int, wire.Parcel]]:
        """What goes into one request: as much as the server takes, or all that is compared."""
        request: dict[int, wire.Parcel] = {}
        for n, parcel in parcels.items():
            full = len(request) == self.items or _size({**request, n: parcel}) > self.size
            if request and full and not self.together:
                yield request
                request = {}
            request[n] = parcel
        if request:
            yield request

    def _ask(self, request: dict[int, wire.Parcel]) -> tuple[dict[int, Outcome], Failure | None]:
        """The outcomes of a request, asked for until all are there, and why some are not.

        Raises:
            UserError: the server refuses it.
        """
        outcomes: dict[int, Outcome] = {}
        missing = dict(request)
        heard = time.monotonic()
        while missing:
            body = wire.pack(self.scorer, list(missing.values()), self.timeout)
            left = heard + self.caller.budget - time.monotonic()
            headers = {"content-type": wire.CONTENT_TYPE}
            try:
                response = self.caller.send("POST", "/score", budget=left, content=body, headers=headers)
            except NoAnswer as error:
                return outcomes, Failure("remote", str(error))
            _check(self.caller, response)
            try:
                answers = _answers(response.json(), list(missing.values()))
            except (ValueError, KeyError, TypeError) as error:
                return outcomes, Failure("remote", f"{self.caller.url}: not an answer: {type(error).__name__}: {error}")
            found = {n: one for n, one in zip(missing, answers, strict=True) if not _is_late(one)}
            outcomes |= found
            missing = {n: parcel for n, parcel in missing.items() if n not in found}
            if found:
                heard = time.monotonic()
            elif time.monotonic() > heard + self.caller.budget:
                return outcomes, Failure("timeout", f"no outcome within {self.caller.budget:g} seconds")
        return outcomes, None


def _answers(content: Any, asked: Sequence[wire.Parcel]) -> list[Outcome]:
    """One outcome per item that was asked for."""
    if content["version"] != wire.VERSION:
        raise ValueError(f"version {content['version']}")
    keys = [answer["key"] for answer in content["items"]]
    if keys != [parcel.item.key for parcel in asked]:
        raise ValueError("answers to other items")
    return [wire.from_json(answer) for answer in content["items"]]


def _size(request: dict[int, wire.Parcel]) -> int:
    return wire.ENVELOPE + sum(parcel.size for parcel in request.values())


def _is_late(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.kind == "timeout"
