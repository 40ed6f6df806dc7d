"""The Ray engine: groups of records go through a pool of actors of Ray Data, which restarts those that die."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffalign.errors import UserError
from diffalign.records import Record

Work = Callable[[Sequence[Record]], list[Record]]


def _worker(load: Callable[[], Work]) -> Any:
    """A class of actors: each loads once, then works on whatever groups it is given."""

    class Worker:
        def __init__(self) -> None:
            self.work = load()

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return {"records": _lines(self.work(_parsed(row)))}

    return Worker


def _lines(records: Sequence[Record]) -> list[str]:
    return [record.model_dump_json(exclude_defaults=True) for record in records]


def _parsed(row: dict[str, Any]) -> list[Record]:
    return [Record.model_validate_json(line) for line in row["records"]]


def ray_stream(load: Callable[[], Work], groups: Sequence[Sequence[Record]], workers: int) -> Iterator[list[Record]]:
    """The results of groups, in order. Ray Data bounds what is under way, and sends the group of a dead actor again.

    A running cluster is used when ``RAY_ADDRESS`` names one; otherwise Ray starts on this machine and ends with the
    process. Every worker needs the folders of the run under the same path.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine: ray needs Ray: pip install 'diffalign[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports every stage, and that progress bars are off
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    lines = [{"records": _lines(group)} for group in groups]
    workers = min(workers, len(groups))
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    cpus = 1 if gpus else max(1, (os.cpu_count() or 1) // workers)
    pool = ray.data.ActorPoolStrategy(size=workers)
    made = ray.data.from_items(lines, override_num_blocks=len(lines)).map(
        _worker(load), compute=pool, num_cpus=cpus, num_gpus=gpus
    )
    for row in made.iter_rows():
        yield _parsed(row)
