"""The scorers of the reward server in the tests, which its process imports."""

import time
from dataclasses import dataclass
from pathlib import Path

from diffalign.scoring import Failure, Sample, Score


@dataclass
class Slow:
    """Takes its time and writes down whatever it scores."""

    log: Path
    seconds: float
    accepts: frozenset[str] = frozenset({"text"})

    def __call__(self, samples):
        time.sleep(self.seconds)
        with self.log.open("a") as handle:
            handle.writelines(f"{len(samples)} {sample.text}\n" for sample in samples)
        return [Score(float(len(sample.text)), detail={"batch": len(samples)}) for sample in samples]


@dataclass
class Files:
    """The size of each file it is given; fails where it says so."""

    accepts: frozenset[str] = frozenset({"text", "image", "video", "mesh"})

    def __call__(self, samples):
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample):
        if sample.prompt == "fail":
            return Failure("input", "as you wish")
        if sample.prompt == "raise":
            raise RuntimeError("as you wish")
        if sample.prompt == "nan":
            return Score(float("nan"))
        if sample.mesh is not None and sample.mesh.suffix == ".npz":
            from diffalign import mesh

            return Score(float(mesh.read_occupancy(sample.mesh).sum()))
        path = sample.condition or sample.video or sample.mesh
        size = path.stat().st_size if path else 0
        return Score(float(size), detail={"path": str(path), "meta": dict(sample.meta)})


@dataclass
class Ranks:
    """Compares: the rank of a text's length among those it sees."""

    accepts: frozenset[str] = frozenset({"text"})
    together: bool = True

    def __call__(self, samples):
        lengths = sorted(len(sample.text) for sample in samples)
        return [Score(float(lengths.index(len(sample.text))), (0.0, float(len(samples)))) for sample in samples]


def slow(log: str, seconds: float = 0.0) -> Slow:
    return Slow(Path(log), seconds)


def files() -> Files:
    return Files()


def ranks() -> Ranks:
    return Ranks()
