"""Many clients on one reward server that is killed with SIGKILL and restarted under load: what is lost or done twice?

    python benchmarks/reward_server.py            # 64 clients x 200 items, 5 kills: about two minutes on two cores
    python benchmarks/reward_server.py --check    # the same without a section in RESULTS.md

Every client is a thread with a `remote` scorer of its own that asks for a few items at a time. The server's scorer
writes a line when it begins with an item and gives it a random value, so that these must agree: what the clients were
told, what the server's journal holds, and what was scored. An item may be scored twice only if it was in the one batch
that a kill hit between the beginning of its scoring and its journal entry.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from _results import machine, write_section
from PIL import Image

from diffalign.scoring import Sample, Score, load_scorer

TITLE = "Reward server"
HERE = Path(__file__).parent


class Server:
    """`diffalign serve` on a port that stays the same over restarts."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log, self.journal = folder / "scored.txt", folder / "journal.jsonl"
        params = {"log": str(self.log), "seconds": args.seconds}
        scorer = {"name": "_counting:build", "label": "counting", "params": params}
        config = {"scorers": [scorer], "port": self.port, "journal": str(self.journal), "max_batch": args.max_batch}
        self.config = folder / "serve.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.start()

    def start(self) -> None:
        paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        words = [sys.executable, "-m", "diffalign", "serve", str(self.config)]
        environment = {**os.environ, "PYTHONPATH": paths}
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE)
        assert self.process.stdout is not None
        if not self.process.stdout.readline().startswith("serving"):
            sys.exit("the server did not start")

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Run(NamedTuple):
    """What the clients saw."""

    told: dict[str, float]
    failed: list[str]
    latencies: list[float]
    seconds: float

    def row(self, name: str, kills: int) -> str:
        cuts = statistics.quantiles(self.latencies, n=20)
        rate = len(self.told) / self.seconds
        return f"| {name} | {kills} | {len(self.told):,} | {rate:,.0f} | {1e3 * cuts[9]:.0f} | {1e3 * cuts[18]:.0f} |"


def samples(client: int, args: argparse.Namespace, kind: str) -> list[Sample]:
    """The items of a client; the prompt says which one it is."""
    names = [f"{kind}-{client}-{i}" for i in range(args.items)]
    if kind == "text":
        return [Sample(name, text=name) for name in names]
    pixels = np.random.default_rng(client).integers(0, 255, (args.pixels, args.pixels, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((args.pixels, args.pixels))
    return [Sample(name, image=picture) for name in names]


def load(server: Server, args: argparse.Namespace, kind: str, kills: int) -> Run:
    """All clients at once, with so many kills spread over the work."""
    told: dict[str, float] = {}
    failed: list[str] = []
    latencies: list[float] = []

    def client(number: int) -> None:
        scorer = load_scorer("remote", url=server.url, scorer="counting", budget=args.budget)
        items = samples(number, args, kind)
        barrier.wait()
        for start in range(0, len(items), args.request):
            asked = items[start : start + args.request]
            began = time.perf_counter()
            for sample, outcome in zip(asked, scorer(asked), strict=True):
                if isinstance(outcome, Score):
                    told[sample.prompt] = outcome.value
                else:
                    failed.append(f"{sample.prompt}: {outcome}")
            latencies.append(time.perf_counter() - began)

    moments = random.Random(0)
    barrier = threading.Barrier(args.clients + 1)
    threads = [threading.Thread(target=client, args=(n,)) for n in range(args.clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for kill in range(kills):
        due = args.clients * args.items * (kill + 1) // (kills + 1)
        while len(told) + len(failed) < due:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 4 * args.seconds))
        server.stop(signal.SIGKILL)
        server.start()
    for thread in threads:
        thread.join()
    return Run(told, failed, latencies, time.perf_counter() - began)


def check(server: Server, run: Run, args: argparse.Namespace, kills: int) -> int:
    """How many items were scored again; exits if anything was lost, told wrongly, or scored twice without need."""
    owed = args.clients * args.items
    if run.failed or len(run.told) != owed:
        sys.exit(f"lost: {len(run.told)} of {owed} items have a score; {run.failed[:3]}")
    lines = [json.loads(line) for line in server.journal.read_text().splitlines()]
    units = Counter(tuple(line["unit"][1]) for line in lines)
    if max(units.values()) > 1:
        sys.exit("an item has two outcomes in the journal")
    written = Counter(line["answers"][0]["value"] for line in lines)
    if written != Counter(run.told.values()):
        sys.exit("the clients were told other values than the journal holds")
    again = Counter(server.log.read_text().splitlines())
    if set(again) != set(run.told):
        sys.exit("what was scored is not what was asked for")
    twice = sum(count - 1 for count in again.values())
    if twice > kills * args.max_batch:
        sys.exit(f"{twice} items were scored again after {kills} kills with batches of {args.max_batch}")
    return twice


def report(rows: list[str], twice: int, args: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    given = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in vars(args).items() if key != "check")
    table = "| items | kills | number | items/s | p50 ms | p95 ms |\n|---|---:|---:|---:|---:|---:|"
    parts = [
        f"`python benchmarks/reward_server.py {given}`, {machine()}.",
        f"**{args.kills} kills under load: every item has one outcome, and none whose outcome was written was scored "
        f"again.** {args.clients} clients on one server with a journal. {twice} items were being scored when a "
        "kill hit and had no outcome on disk; these were scored a second time, and their clients were told the second "
        "value alone.",
        "\n".join([table, *rows]),
        f"Latency is that of a request of {args.request} items, retries and restarts of the server included. Clients "
        f"and server share the machine; a call of the scorer takes {1e3 * args.seconds:g} ms for up to "
        f"{args.max_batch} items. Pictures are noise of {args.pixels} x {args.pixels} pixels as PNG.",
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--items", type=int, default=200, help="per client")
    parser.add_argument("--request", type=int, default=8, help="items per request")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.02, help="that a call of the scorer takes")
    parser.add_argument("--pixels", type=int, default=128, help="side of the pictures")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds that a client tries for")
    parser.add_argument("--check", action="store_true", help="write no section")
    args = parser.parse_args()
    rows, twice = [], 0
    for kind, kills in (("text", args.kills), ("text", 0), ("image", 0)):
        with tempfile.TemporaryDirectory() as folder:
            server = Server(Path(folder), args)
            try:
                run = load(server, args, kind, kills)
                again = check(server, run, args, kills)
            finally:
                server.stop(signal.SIGTERM)
        twice += again
        rows.append(run.row(kind, kills))
        print(f"{rows[-1]} scored again: {again}", flush=True)
    if not args.check:
        write_section(TITLE, report(rows, twice, args))


if __name__ == "__main__":
    main()
