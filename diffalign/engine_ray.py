"""The Ray engine: groups of records go through a pool of actors of Ray Data, which restarts those that die."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffalign.errors import UserError
from diffalign.records import Record


class _Worker:
    """An actor: loads once, then works on whatever groups it is given."""

    def __init__(self, load: Callable[[], Callable[[Sequence[Record]], list[Record]]]) -> None:
        self.work = load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        made = self.work([Record.model_validate_json(line) for line in row["records"]])
        return {"records": [record.model_dump_json(exclude_defaults=True) for record in made]}


def ray_stream(
    load: Callable[[], Callable[[Sequence[Record]], list[Record]]], groups: Sequence[Sequence[Record]], workers: int
) -> Iterator[list[Record]]:
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
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    lines = [{"records": [record.model_dump_json(exclude_defaults=True) for record in group]} for group in groups]
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    cpus = 1 if gpus else max(1, (os.cpu_count() or 1) // workers)
    pool = ray.data.ActorPoolStrategy(size=workers)
    worker: Any = _Worker  # a class whose instances are the function, which Ray's annotation does not say
    made = ray.data.from_items(lines, override_num_blocks=len(lines)).map(
        worker, fn_constructor_args=(load,), compute=pool, num_cpus=cpus, num_gpus=gpus
    )
    for row in made.iter_rows():
        yield [Record.model_validate_json(line) for line in row["records"]]
