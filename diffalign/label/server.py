"""The web server behind the page. Everything that comes in is checked here; nothing that comes in names a file."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from diffalign.label.answers import Conflict, Journal
from diffalign.label.desk import Desk, Refusal
from diffalign.label.plan import TYPES, Plan
from diffalign.records import explain

BODY = 64 * 1024
"""Bytes of the largest request that is read; an answer has a few hundred."""
STATIC = {
    "label.html": "text/html; charset=utf-8",
    "label.css": "text/css; charset=utf-8",
    "label.js": "text/javascript; charset=utf-8",
    "cards.js": "text/javascript; charset=utf-8",
    "tasks.js": "text/javascript; charset=utf-8",
    "agreement.js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


@dataclass(frozen=True)
class Gate:
    """Who is let in: the right Host (against DNS rebinding), the right origin, and the token where there is one."""

    host: str
    port: int
    token: str | None
    local: bool

    def url(self) -> str:
        """Where the page is."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        host = f"[{host}]" if ":" in host else host
        query = f"?{urlencode({'token': self.token})}" if self.token else ""
        return f"http://{host}:{self.port}/{query}"

    @property
    def cookie(self) -> str:
        """Name of the cookie; cookies know no ports, so it has the port in it."""
        return f"diffalign_label_{self.port}"

    def proof(self) -> str:
        """What the cookie holds."""
        return hashlib.sha256(f"diffalign label|{self.token}".encode()).hexdigest()

    def refusal(self, request: Request) -> Response | None:
        """Why a request is not answered, or the redirect after which it is; None where it is let in."""
        host = request.headers.get("host", "")
        if self.local and host not in {
            f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]", self.host)
        }:
            return _line(403, "wrong Host header")
        if request.method not in ("GET", "HEAD", "POST"):
            return _line(405, "method not allowed")
        if request.method == "POST":
            if urlsplit(request.headers.get("origin", "")).netloc != host:
                return _line(403, "the Origin header must be the page's own")
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return _line(415, "the content type must be application/json")
        return None if self.token is None else self._ask_token(request, self.token)

    def _ask_token(self, request: Request, token: str) -> Response | None:
        given = parse_qs(request.url.query).get("token", [""])[0]
        if request.method == "GET" and request.url.path == "/" and given:
            if not hmac.compare_digest(given.encode(), token.encode()):
                return _line(401, "wrong token")
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(self.cookie, self.proof(), httponly=True, samesite="lax", max_age=30 * 86400)
            return answer
        if hmac.compare_digest(request.cookies.get(self.cookie, "").encode(), self.proof().encode()):
            return None
        return _line(401, "open the URL that `diffalign label` printed: it has the token in it")


class _Guard:
    """ASGI middleware: the gate, the limit on bodies, and the headers of every answer."""

    def __init__(self, app: Any, gate: Gate) -> None:
        self.app, self.gate = app, gate

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                extra = {"cache-control": "no-store"} | HEADERS
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in names),
                ]
            await send(message)

        refusal = self.gate.refusal(Request(scope))
        await (refusal or self.app)(scope, receive, send_with_headers)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Who(_Body):
    """A request of one annotator."""

    annotator: str


class Given(Who):
    """An answer; places from left to right."""

    item: str
    answer: Any
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)


def _line(status: int, text: str) -> Response:
    return PlainTextResponse(" ".join(text.split()) + "\n", status)


async def _body(request: Request, model: type[_Body]) -> Any:
    """The body of a request as a model.

    Raises:
        Refusal: it is too large, not JSON, or not what is expected.
    """
    content = b""
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > BODY:
                raise Refusal(413, f"the body has more than {BODY} bytes")
    except ClientDisconnect:
        raise Refusal(400, "the body is cut off") from None
    try:
        return model.model_validate(json.loads(content))
    except ValidationError as error:
        raise Refusal(400, explain(error)) from None
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not valid JSON") from None


def application(plan: Plan, journal: Journal, gate: Gate, names: list[str], overlap: int | None) -> Any:
    """The ASGI application.

    All handlers run on one event loop, and none waits between reading the answers and writing one: no locks.

    Args:
        names: who may answer; empty for anybody.
        overlap: how many annotators an item is for.
    """
    app = FastAPI(openapi_url=None)
    desk = Desk(plan, journal, names, overlap, time.monotonic)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, error: Refusal) -> Response:
        return _line(error.status, error.text)

    @app.exception_handler(Conflict)
    async def conflict(_: Request, error: Conflict) -> Response:
        return _line(409, str(error))

    @app.exception_handler(OSError)
    async def unwritten(_: Request, error: OSError) -> Response:
        return _line(507, f"the answer is not saved: {error.strerror or error}")

    @app.get("/")
    async def page() -> Response:
        return _static("label.html")

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        return _static(name)

    @app.get("/media/{name}")
    async def media(name: str) -> Response:
        path = plan.media.get(name)
        if path is None or not path.is_file():
            return _line(404, "no such file")
        kept = {"cache-control": "private, max-age=86400"}
        return FileResponse(path, media_type=TYPES[path.suffix.lower()], headers=kept)

    @app.get("/api/job")
    async def job() -> Response:
        return JSONResponse(desk.job())

    @app.post("/api/next")
    async def following(request: Request) -> Response:
        who = await _body(request, Who)
        return JSONResponse(desk.following(who.annotator))

    @app.post("/api/answer")
    async def answer(request: Request) -> Response:
        given = await _body(request, Given)
        return JSONResponse(desk.answer(given.annotator, given.item, given.answer, given.seconds))

    @app.post("/api/undo")
    async def undo(request: Request) -> Response:
        who = await _body(request, Who)
        return JSONResponse(desk.undo(who.annotator))

    @app.get("/api/agreement")
    async def agreement() -> Response:
        return JSONResponse(desk.agreement())

    return _Guard(app, gate)


def _static(name: str) -> Response:
    if name not in STATIC:
        return _line(404, "no such file")
    return Response(files("diffalign.label").joinpath("static", name).read_bytes(), media_type=STATIC[name])
