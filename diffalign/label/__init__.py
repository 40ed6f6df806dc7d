"""`diffalign label`: a local page on which people compare candidates, and the labels made of their answers."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import socket
from collections import Counter
from pathlib import Path
from typing import Any

from diffalign import records
from diffalign.config import LabelConfig
from diffalign.errors import UserError
from diffalign.files import claim, siblings
from diffalign.label import answers as journal
from diffalign.label import merge, plan
from diffalign.label.plan import Plan


def run(config: LabelConfig, dry_run: bool = False) -> Path:
    """Serve the page until interrupted, or merge the answers.

    ``dry_run`` checks the records, their files and the answers there are, and neither serves nor writes.

    Returns:
        The file of answers, or the merged records.

    Raises:
        UserError: the records cannot be shown, the answers belong to something else, or the address needs a token.
    """
    source, out = Path(config.records), Path(config.out)
    check_address(config.host, config.token)
    names = check_names(config.annotators)
    if config.overlap and names and config.overlap > len(names):
        raise UserError(f"overlap: {config.overlap}: there are only {len(names)} annotators")
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: is the input itself; choose another file for the answers")
    job = questions(config)
    claim(out, identity(config), write=not dry_run and config.merge is None)
    if config.merge is not None:
        return _merge(config, job, dry_run)
    if dry_run:
        there = len(read_answers(out, job)) if out.is_file() else 0
        print(f"would ask {len(job.items)} questions ({config.task}) about {source} into {out}; {there} answers so far")
        return out
    _serve(config, job, names)
    return out


def check_address(host: str, token: str | None) -> None:
    """Refuse to let others in without a token."""
    if host != "localhost" and not _is_loopback(host) and token is None:
        raise UserError(f"host: {host!r} can be reached from other machines; that needs a `token:` (12 characters)")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_names(names: list[str]) -> list[str]:
    """Refuse names of annotators that cannot be told apart or shown."""
    for name in names:
        if journal.clean_name(name) != name:
            raise UserError(f"annotators: {name!r} is no name: 1 to {journal.LONGEST_NAME} printable characters")
        if names.count(name) > 1:
            raise UserError(f"annotators: {name!r} is there twice")
    return names


def questions(config: LabelConfig) -> Plan:
    """All that is asked.

    Raises:
        UserError: the records cannot be shown.
    """
    return plan.make(
        Path(config.records),
        config.task,
        seed=config.seed,
        pairs=config.pairs,
        limit=config.limit,
        segment_seconds=config.segment_seconds,
    )


def identity(config: LabelConfig) -> dict[str, Any]:
    """What decides the items: answers belong to nothing else."""
    source = Path(config.records)
    with source.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    keys = {"pair": ("pairs",), "segments": ("pairs", "segment_seconds")}.get(config.task, ())
    return {
        "records": {"file": source.name, "sha256": digest},
        **{key: getattr(config, key) for key in ("task", "seed", *keys)},
    }


def read_answers(path: Path, job: Plan) -> journal.Answers:
    """The answers of a file, checked against what was asked.

    Raises:
        UserError: a line is no answer, or does not fit its item.
    """
    return check_answers(path, job, journal.read(path))


def check_answers(path: Path, job: Plan, found: journal.Answers) -> journal.Answers:
    """Refuse answers that do not fit their items; those to items beyond ``limit`` are left alone."""
    for item in job.items.values():
        for line in found.by_item.get(item.id, {}).values():
            wrong = (
                f"shown must be {list(item.candidates)} in some order"
                if sorted(line.shown) != list(item.candidates)
                else plan.check_answer(job.task, item, plan.as_places(line.answer, line.shown))
            )
            if wrong:
                raise UserError(f"{path}: {line.annotator!r} on {item.id!r}: {wrong}")
    return found


def _merge(config: LabelConfig, job: Plan, dry_run: bool) -> Path:
    assert config.merge is not None
    source, target = siblings(config.records, config.merge)
    if target.resolve() == Path(config.out).resolve():
        raise UserError(f"{target}: holds the answers; choose another file for `merge`")
    found = read_answers(Path(config.out), job)
    counts: Counter[str] = Counter()
    made = merge.merged(source, job, found, config.label, counts)
    if dry_run:
        for _ in made:
            pass
    else:
        records.write(target, _some(made, config.out))
    done = "would write" if dry_run else "wrote"
    print(
        f"{done} {counts['records']} records with the label {config.label!r} to {target}; {counts['empty']} records "
        f"left out without an answer; {counts['unseen']} candidates not compared, which get no label"
    )
    return target


def _some(made: Any, out: str) -> Any:
    """The records; an error if there are none."""
    empty = True
    for record in made:
        empty = False
        yield record
    if empty:
        raise UserError(f"{out}: no answers yet; nothing to merge")


def _serve(config: LabelConfig, job: Plan, names: list[str]) -> None:
    try:
        import uvicorn

        from diffalign.label.server import Gate, application
    except ImportError as error:
        raise UserError(f"the page needs {error.name}: pip install 'diffalign[web]'") from None
    with journal.Journal(Path(config.out)) as answers, _listen(config.host, config.port) as listener:
        check_answers(answers.path, job, answers.answers)
        port = listener.getsockname()[1]
        gate = Gate(config.host, port, config.token, local=config.host == "localhost" or _is_loopback(config.host))
        settings = uvicorn.Config(
            application(job, answers, gate, names, config.overlap),
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
        )
        print(f"open: {gate.url()}\nanswers: {config.out} ({len(answers.answers)} so far); Ctrl+C stops", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])
        print(f"{len(answers.answers)} answers in {config.out}; `merge=` makes labels of them")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"{host}:{port} {error.strerror or error}; choose another `port`") from None
