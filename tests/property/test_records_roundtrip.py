"""Any sound record survives the disk, and any prefix of a file resumes to the same file."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import records
from diffalign.records import Appender, Candidate, Message, Record

numbers = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(text, json_values, max_size=3)
conversations = text | st.lists(st.builds(Message, role=text, content=text), max_size=2)
labels = st.dictionaries(text, numbers | st.lists(numbers, min_size=1, max_size=4), max_size=3)
optional = st.none() | text
candidates = st.builds(Candidate, sample=text, condition=optional, labels=labels, origin=objects) | st.builds(
    Candidate, text=conversations, condition=optional, labels=labels, origin=objects
)
rows = st.builds(
    Record,
    id=st.text(min_size=1, max_size=8),
    prompt=conversations,
    condition=optional,
    source=optional,
    candidates=st.lists(candidates, max_size=3),
    meta=objects,
)
datasets = st.lists(rows, min_size=1, max_size=4, unique_by=lambda row: row.id)


@settings(deadline=None)
@given(datasets)
def test_what_is_written_reads_back(dataset):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        records.write(path, dataset)
        assert list(records.read(path)) == dataset


@settings(deadline=None, max_examples=50)
@given(datasets, st.data())
def test_a_crash_at_any_byte_resumes_to_the_same_file(dataset, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        records.write(path, dataset)
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        with Appender(path) as out:
            out.append(row for row in dataset if row.id not in out.done)
        assert path.read_bytes() == whole
