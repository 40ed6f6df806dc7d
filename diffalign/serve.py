"""`diffalign serve`: scorers behind HTTP, for many clients at once. ``scorers/remote`` is the other end.

What is promised, with a ``journal``: every item of a client gets one outcome, whatever happens to the server. An item
whose outcome was written is never scored again, also after a kill. An item that was being scored when the server was
killed has no outcome, so that the client's retry scores it again: at least once on the GPU, exactly once in results.
Without a journal the same holds until the server stops.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

from diffalign.config import ServeConfig
from diffalign.errors import UserError
from diffalign.outcomes import Outcomes
from diffalign.score import by_label, load_scorers
from diffalign.scoring import Scorer
from diffalign.serving import Engine

MB = 10**6


def run(config: ServeConfig, dry_run: bool = False) -> None:
    """Load the scorers and serve them until SIGINT or SIGTERM; then finish what is queued.

    ``dry_run`` loads the scorers and does not listen.

    Raises:
        UserError: another host than a loopback one without a token, no such scorer, or a journal of other scorers.
    """
    try:
        import uvicorn

        from diffalign.serve_http import Door
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs the package {error.name}: pip install 'diffalign[web]'") from None
    token = _token(config)
    specs = by_label(config.scorers)
    scorers = load_scorers(specs)
    if dry_run:
        print(f"would serve {', '.join(scorers)} on {config.host} port {config.port}")
        return
    identity = {"scorers": {label: {"name": spec.name, "params": spec.params} for label, spec in specs.items()}}
    with _listen(config.host, config.port) as listener:
        outcomes = Outcomes(Path(config.journal) if config.journal else None, config.retention, identity)
        door = Door(
            _engine(config, scorers, outcomes),
            token=token,
            max_items=config.max_items,
            max_body=config.max_body_mb * MB,
            timeout=config.timeout,
            upload_timeout=config.upload_timeout,
        )
        host, port = listener.getsockname()[:2]
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"serving {', '.join(scorers)} on {where}; {len(outcomes)} outcomes known", flush=True)
        uvicorn.Server(uvicorn.Config(door.app(), log_level="warning", server_header=False)).run([listener])


def _engine(config: ServeConfig, scorers: dict[str, Scorer], outcomes: Outcomes) -> Engine:
    return Engine(
        scorers,
        outcomes,
        max_batch=config.max_batch,
        max_wait=config.max_wait_ms / 1000,
        max_queued=config.max_queued,
        max_bytes=config.max_queued_mb * MB,
        max_pixels=config.max_pixels,
    )


def _token(config: ServeConfig) -> str | None:
    """The token that clients must show, if any."""
    if config.token_env is None:
        if not _is_loopback(config.host):
            raise UserError(f"host {config.host}: not a loopback address, so `token_env` must name a variable")
        return None
    token = os.environ.get(config.token_env, "")
    if len(token) < 16 or not token.isascii() or any(c.isspace() for c in token):
        raise UserError(f"token_env: ${config.token_env} must hold 16 or more ASCII characters without spaces")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}") from None
    # connections inherit it; asyncio sets it for its own sockets only, and an answer in two parts would wait 40 ms
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
