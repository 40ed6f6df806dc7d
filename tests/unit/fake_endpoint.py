"""A server that plays an OpenAI-compatible one: it checks requests and answers by a function."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

KEY = "key-of-the-tests"
Reply = dict[str, Any] | int | bytes
"""A choice, a status, or the bytes of a body."""


class Asked:
    """One request: its text and its pictures, decoded."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        [message] = body["messages"]
        assert (message["role"], body["model"]) == ("user", "a-model")
        self.texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
        self.pictures = [_decode(url) for url in urls]

    @property
    def colors(self) -> list[int]:
        """The red of each picture's middle."""
        return [image.getpixel((image.width // 2, image.height // 2))[0] for image in self.pictures]


def _decode(url: str) -> Image.Image:
    kind, _, content = url.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert kind == f"data:image/{image.format.lower()}"
    return image.convert("RGB")


class Endpoint:
    """Where it is, and what was asked."""

    def __init__(self, reply: Callable[[Asked], Reply]) -> None:
        self.reply = reply
        self.asked: list[Asked] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""


@contextmanager
def serving(reply: Callable[[Asked], Reply]) -> Iterator[Endpoint]:
    """An endpoint that answers every question with ``reply``."""
    endpoint = Endpoint(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            content = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/chat/completions"
            asked = Asked(json.loads(content))
            endpoint.asked.append(asked)
            endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = endpoint.reply(asked)
            status = answer if isinstance(answer, int) else 200
            body = answer if isinstance(answer, bytes) else json.dumps({"choices": [answer]}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def says(text: str) -> dict[str, Any]:
    """A choice with this text."""
    return {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}


def likely(**logprobs: float) -> dict[str, Any]:
    """A choice whose first token has these log-probs."""
    top = [{"token": token.replace("_", " "), "logprob": value} for token, value in logprobs.items()]
    return {**says("Yes"), "logprobs": {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": top}]}}
