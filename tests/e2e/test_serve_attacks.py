"""Nothing that a client sends breaks a reward server, or makes it do what it should not."""

import io
import socket
import struct
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from diffalign import wire
from diffalign.errors import UserError
from diffalign.scoring import Failure, Sample, Score

from .reward_server import TOKEN, TYPE, Server, answers, ask, is_fine, noise, picture, remote, text


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for the tests that do not stop it."""
    folder = tmp_path_factory.mktemp("served")
    options = {"max_body_mb": 2, "max_items": 100, "max_pixels": 1_000_000, "upload_timeout": 1.0}
    with Server(folder, journal=str(folder / "journal.jsonl"), **options) as running:
        yield running


def test_bodies_that_are_too_large(server):
    response = httpx.post(f"{server.url}/score", content=bytes(2_000_001), headers=TYPE)
    assert response.status_code == 413

    def chunks():
        for _ in range(50):
            yield bytes(100_000)

    with suppress(httpx.TransportError):  # without a length the server finds out on the way, and may hang up
        assert httpx.post(f"{server.url}/score", content=chunks(), headers=TYPE).status_code == 413
    parcels = [text(f"k{n}", "x") for n in range(101)]
    assert ask(server, "files", parcels).status_code == 413
    assert is_fine(server)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "header"),
        (b'{"version": 2}', "speaks version 1, not 2"),
        (b'{"version": 1, "scorer": "files", "items": []}', "items"),
        (b'{"version": 1, "scorer": "files", "items": [{"key": "k", "prompt": "p"}]}', "expected a text or one"),
        (b'{"version": 1, "scorer": "files", "items": [{"key": "../k", "prompt": "p", "text": ""}]}', "key"),
        (b'{"version": 1, "timeout": NaN, "scorer": "files", "items": []}', "NaN is no JSON"),
        (
            b'{"version": 1, "scorer": "files", "items": [{"key": "k", "prompt": "p", "files": '
            b'[{"role": "video", "suffix": ".mp4", "bytes": 99}]}]}',
            "0 bytes of files, but the header lists 99",
        ),
        (
            b'{"version": 1, "scorer": "files", "items": [{"key": "k", "prompt": "p", "files": '
            b'[{"role": "video", "suffix": "/../../x.mp4", "bytes": 0}]}]}',
            "suffix",
        ),
        (
            b'{"version": 1, "scorer": "files", "items": [{"key": "k", "prompt": "p", "files": '
            b'[{"role": "video", "suffix": ".pkl", "bytes": 0}]}]}',
            "no ending of a file of kind video",
        ),
        (
            b'{"version": 1, "scorer": "files", "items": [{"key": "k", "prompt": "p", "text": ""}, '
            b'{"key": "k", "prompt": "p", "text": ""}]}',
            "two items have the same key",
        ),
    ],
)
def test_malformed_headers(server, header, reason):
    body = struct.pack(">I", len(header)) + header
    response = httpx.post(f"{server.url}/score", content=body, headers=TYPE)
    assert response.status_code == 400
    assert reason in response.json()["error"]


@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff\xff\xff\xff{}", b"\x80\x04\x95cos\nsystem\n"])
def test_bodies_that_are_no_request(server, body):
    assert httpx.post(f"{server.url}/score", content=body, headers=TYPE).status_code == 400


def test_other_types_and_scorers(server):
    assert httpx.post(f"{server.url}/score", json={}).status_code == 415
    response = ask(server, "fills", [text("k", "x")])
    assert (response.status_code, "did you mean 'files'" in response.text) == (404, True)
    assert ask(server, "jpeg", [text("k", "x")]).status_code == 422


def test_decompression_bombs(server):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    for side in (2_000, 10_000, 60_000):  # over our limit, over PIL's warning, over PIL's error
        ihdr = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        [answer] = answers(ask(server, "jpeg", [picture(f"bomb-{side}", bomb)]))
        assert answer["status"] == "failed"
        assert (answer["kind"], "/" in answer["reason"]) == ("input", False)
        assert "more than 1,000,000 pixels" in answer["reason"]


def test_broken_pictures(server):
    held = io.BytesIO()
    noise(0).save(held, "PNG")
    for n, content in enumerate((b"", b"GIF89a", held.getvalue()[:200])):
        [answer] = answers(ask(server, "jpeg", [picture(f"broken-{n}", content)]))
        assert (answer["status"], answer["kind"]) == ("failed", "input")
        assert str(server.folder) not in answer["reason"]


def test_nothing_is_unpickled(server, tmp_path):
    class Bad:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    np.savez(tmp_path / "grid.npz", side=np.array(4), bits=np.array([Bad()], dtype=object))
    [found] = remote(server, "files")([Sample("p", mesh=tmp_path / "grid.npz")])
    assert isinstance(found, Failure)
    assert found.kind == "input"
    assert not (tmp_path / "owned").exists()


def test_slow_clients_are_let_go(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n")
        slow.sendall(f"Content-Type: {wire.CONTENT_TYPE}\r\n\r\nabc".encode())
        assert is_fine(server)  # others are not kept waiting
        assert b" 408 " in slow.recv(1000)


def test_a_full_queue_asks_to_come_back(tmp_path):
    with Server(tmp_path, max_queued=4, max_items=4, max_batch=1) as running:
        first = threading.Thread(target=ask, args=(running, "slow", [text(f"a{n}", "x") for n in range(4)]))
        first.start()
        while not running.scored():
            time.sleep(0.005)
        response = ask(running, "slow", [text(f"b{n}", "x") for n in range(4)])
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        found = remote(running, "slow", batch=4)([Sample("p", text="x" * n) for n in range(1, 9)])
        assert [one.value for one in found] == list(range(1, 9))  # a client comes back by itself
        first.join()


def test_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("RIGHT", TOKEN)
    monkeypatch.setenv("WRONG", TOKEN[:-1])
    with Server(tmp_path, token_env="SERVED_TOKEN") as running:
        assert isinstance(remote(running, "files", token_env="RIGHT")([Sample("p", text="x")])[0], Score)
        for variable in ("WRONG", None):
            with pytest.raises(UserError, match="refused: 401 Unauthorized"):
                remote(running, "files", token_env=variable)
        for header in ("", f"Bearer {TOKEN}x", f"bearer {TOKEN}", TOKEN, "Bearer \xe9"):
            response = ask(running, "files", [text("k", "x")], authorization=header.encode("latin-1"))
            assert response.status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 401
