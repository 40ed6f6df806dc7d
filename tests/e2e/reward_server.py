"""A reward server in a process of its own, and what the tests send it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import yaml
from PIL import Image

from diffalign import wire
from diffalign.scoring import Scorer, load_scorer

TYPE = {"content-type": wire.CONTENT_TYPE}
TOKEN = "a-token-of-the-tests"


class Server:
    """`diffalign serve`; as a context it ends with SIGTERM."""

    def __init__(self, folder: Path, **config: object) -> None:
        scorers = [
            {"name": "served:slow", "label": "slow", "params": {"log": str(folder / "scored.txt"), "seconds": 0.05}},
            {"name": "served:files", "label": "files"},
            {"name": "served:ranks", "label": "ranks"},
            {"name": "jpeg"},
        ]
        self.log = folder / "scored.txt"
        self.path = folder / "serve.yaml"
        self.path.write_text(yaml.safe_dump({"scorers": scorers, "port": 0, "max_wait_ms": 5, **config}))
        self.folder = folder

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            assert self.stop(signal.SIGTERM) == -signal.SIGTERM

    def start(self, *words: str) -> None:
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SERVED_TOKEN": "a-token-of-the-tests"}
        command = [sys.executable, "-m", "diffalign", "serve", str(self.path), *words]
        self.errors = (self.folder / "errors.txt").open("ab")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment, cwd=self.folder
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line.startswith("serving"), (self.folder / "errors.txt").read_text()
        self.url = self.line.split(" on ")[1].split(";")[0]

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()
        return code

    def scored(self) -> list[str]:
        """The texts that the slow scorer scored."""
        return [line.split(" ", 1)[1] for line in self.log.read_text().splitlines()] if self.log.exists() else []


def remote(server: Server, scorer: str, **params) -> Scorer:
    return load_scorer("remote", url=server.url, scorer=scorer, **params)


def text(key: str, content: str, **more) -> wire.Parcel:
    return wire.Parcel(wire.Item(key=key, prompt="p", text=content, **more), [])


def picture(key: str, content: bytes) -> wire.Parcel:
    file = {"role": "image", "suffix": ".png", "bytes": len(content)}
    return wire.Parcel(wire.Item.model_validate({"key": key, "prompt": "p", "files": [file]}), [content])


def ask(server: Server, scorer: str, parcels, timeout=None, **headers) -> httpx.Response:
    body = wire.pack(scorer, parcels, timeout)
    return httpx.post(f"{server.url}/score", content=body, headers={**TYPE, **headers}, timeout=30)


def answers(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    return response.json()["items"]


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def is_fine(server: Server) -> bool:
    return answers(ask(server, "files", [text(f"fine-{time.monotonic_ns()}", "x")]))[0]["status"] == "ok"
