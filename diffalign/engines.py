"""Where the work of a stage runs: in this process, or in Ray actors that each hold what a worker loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from diffalign.records import Record

Engine = Literal["local", "ray"]
Work = Callable[[Sequence[Record]], list[Record]]
"""What a worker does with a group of records. A group is never cut, so its numbers do not depend on the engine."""


def stream(
    load: Callable[[], Work], groups: Sequence[Sequence[Record]], engine: Engine, workers: int
) -> Iterator[list[Record]]:
    """The results of groups of records, in order, while the next ones are under way.

    Args:
        load: makes a worker; called once in every worker, and not at all without groups.
        workers: of Ray; the local engine is one.
    """
    if not groups:
        return
    if engine == "ray":
        from diffalign.engine_ray import ray_stream

        yield from ray_stream(load, groups, workers)
        return
    work = load()
    for group in groups:
        yield work(group)
