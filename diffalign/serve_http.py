"""The outside of the reward server: who may ask, how much, and for how long. See :mod:`diffalign.wire` for what."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from diffalign import __version__
from diffalign.errors import UserError, nearest
from diffalign.outcomes import Stored
from diffalign.scoring import Failure
from diffalign.serving import Engine, Full, Job
from diffalign.wire import CONTENT_TYPE, VERSION, Question, to_json, unpack

RETRY_SECONDS = 1


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason


class Door:
    """The two routes, with their limits."""

    def __init__(
        self,
        engine: Engine,
        *,
        token: str | None,
        max_items: int,
        max_body: int,
        timeout: float,
        upload_timeout: float,
    ) -> None:
        self.engine, self.token = engine, token
        self.max_items, self.max_body = max_items, max_body
        self.timeout, self.upload_timeout = timeout, upload_timeout
        self.started = time.monotonic()
        self.arriving = 0  # bytes of bodies that are not taken yet

    def app(self) -> FastAPI:
        """The application; its end is the end of the engine, with all that was queued done."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            running = asyncio.create_task(self.engine.run())
            yield
            await self.engine.close()
            await running
            self.engine.release()

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/score", self.score, methods=["POST"], response_model=None)
        app.add_exception_handler(Refused, self._refuse)
        return app

    async def health(self, request: Request) -> Any:
        """Who reads what, and how it goes."""
        self._check_token(request)
        scorers = {
            label: {"accepts": sorted(scorer.accepts), "together": bool(getattr(scorer, "together", False))}
            for label, scorer in self.engine.scorers.items()
        }
        return {
            "version": VERSION,
            "diffalign": __version__,
            "scorers": scorers,
            "limits": {"items": self.max_items, "bytes": self.max_body},
            "queued": self.engine.queued,
            "known": len(self.engine.outcomes),
            "counts": dict(self.engine.counts),
            "seconds": time.monotonic() - self.started,
        }

    async def score(self, request: Request) -> Any:
        """Outcomes for the items of one request."""
        self._check_token(request)
        if request.headers.get("content-type") != CONTENT_TYPE:  # also what keeps pages in a browser from asking
            raise Refused(415, f"content-type: expected {CONTENT_TYPE}")
        body = await self._body(request)
        try:
            question, parcels = await asyncio.to_thread(unpack, body)
        except UserError as error:
            raise Refused(400, str(error)) from None
        self._check_question(question)
        try:
            asked = self.engine.ask(question.scorer, parcels)
        except Full:
            raise Refused(429, f"{self.engine.queued} items are waiting already") from None
        limit = min(question.timeout or self.timeout, self.timeout)
        answers = await self._wait(question, asked, limit)
        items = [{"key": parcel.item.key, **answer} for parcel, answer in zip(parcels, answers, strict=True)]
        return JSONResponse({"version": VERSION, "items": items})

    async def _wait(self, question: Question, asked: Sequence[Job | Stored | Failure], limit: float) -> list[Any]:
        """The answer of every item, in order; what is not there after ``limit`` seconds is a timeout."""
        waiting = {one.done for one in asked if isinstance(one, Job)}
        if waiting:
            await asyncio.wait(waiting, timeout=limit)
        answers: list[Any] = []
        together = len(asked) < len(question.items)
        for one in asked:
            count = len(question.items) if together else 1
            if isinstance(one, Failure):
                answers += [to_json(one)] * count
            elif isinstance(one, Stored):
                answers += one.answers
            elif not one.done.done():
                self.engine.counts["timeout"] += count
                answers += [{"status": "timeout"}] * count
            elif error := one.done.exception():
                raise Refused(503, f"the outcome could not be kept: {error}")
            else:
                answers += one.done.result()
        return answers

    # --- limits ---------------------------------------------------------------------------------------------------

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Refused(401, "wrong or missing token")

    def _check_question(self, question: Question) -> None:
        scorers = self.engine.scorers
        if question.scorer not in scorers:
            raise Refused(404, f"unknown scorer {question.scorer[:100]!r}{nearest(question.scorer[:100], scorers)}")
        if len(question.items) > self.max_items:
            raise Refused(413, f"{len(question.items)} items, at most {self.max_items} in one request")
        accepts = scorers[question.scorer].accepts
        for item in question.items:
            if item.kind not in accepts:
                raise Refused(422, f"scorer {question.scorer!r} reads {' or '.join(sorted(accepts))}, not {item.kind}")

    async def _body(self, request: Request) -> bytes:
        """The whole body, given up on as soon as it is too large or too slow."""
        told = request.headers.get("content-length", "")
        if told.isdigit() and int(told) > self.max_body:
            raise Refused(413, f"{told} bytes, at most {self.max_body} in one request")
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.upload_timeout):
                async for chunk in request.stream():
                    size += len(chunk)
                    self.arriving += len(chunk)
                    chunks.append(chunk)
                    if size > self.max_body:
                        raise Refused(413, f"more than {self.max_body} bytes in one request")
                    if self.arriving + self.engine.held > self.engine.max_bytes:
                        raise Refused(429, "too many bytes are waiting already")
        except TimeoutError:
            raise Refused(408, f"the request did not arrive in {self.upload_timeout:g} seconds") from None
        finally:
            self.arriving -= size
        return b"".join(chunks)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = {"connection": "close"} if error.status in (408, 413) else {}
        if error.status == 429:
            headers["retry-after"] = str(RETRY_SECONDS)
        self.engine.counts["refused"] += 1
        return JSONResponse({"error": error.reason}, error.status, headers)
