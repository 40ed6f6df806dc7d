"""Records with labels."""

from diffalign.records import Candidate, Record


def record(name="a", **columns) -> Record:
    """A record from one list per label."""
    rows = zip(*columns.values(), strict=True)
    candidates = [Candidate(sample=f"{i}.png", labels=dict(zip(columns, row))) for i, row in enumerate(rows)]  # noqa: B905
    return Record(id=name, prompt=f"prompt {name}", candidates=candidates, meta={"tag": "colors"})
