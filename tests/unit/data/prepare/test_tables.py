"""Tests of reading rows of Parquet files, saved datasets and hub datasets."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from moh_megatron.config.schema import DataConfig
from moh_megatron.data.prepare import inputs
from moh_megatron.data.prepare.chunks import Chunk
from moh_megatron.data.prepare.inputs import find_inputs, plan_parts
from moh_megatron.data.prepare.read_documents import Event, Reject, SegmentEnd, read_segment
from moh_megatron.data.prepare.tables import saved_files
from moh_megatron.io.errors import UserError

TEXTS = [f"Text {number} é." * 20 for number in range(500)]


def read_events(name: str, **settings: str) -> list[Event]:
    """All events of an input, part by part, without the ends of its segments."""
    found = find_inputs([name])
    parts = plan_parts(found, "file")
    data = DataConfig(**settings)  # pyright: ignore[reportArgumentType]
    segments = [segment for part in parts for segment in part]
    events = [event for segment in segments for event in read_segment(found[0], segment, data, lambda count: None)]
    assert sum(event.lines for event in events if isinstance(event, SegmentEnd)) == len(TEXTS)
    return [event for event in events if not isinstance(event, SegmentEnd)]


def write_parquet(folder: Path) -> str:
    path = folder / "table.parquet"
    table = pyarrow.table({"text": TEXTS, "title": [str(number) for number in range(500)], "number": list(range(500))})
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    return str(path)


def write_saved(folder: Path) -> str:
    table = {"text": TEXTS, "title": [str(number) for number in range(500)], "number": list(range(500))}
    datasets.Dataset.from_dict(table).save_to_disk(folder / "saved")
    return str(folder / "saved")


def write_hub(folder: Path) -> str:
    """A folder, which ``datasets`` opens in the same way as a repository."""
    (folder / "repository").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": TEXTS[250 * number :][:250], "title": ["t"] * 250, "number": [1] * 250})
        pyarrow.parquet.write_table(table, folder / "repository" / f"train-{number}.parquet")
    return f"hf:{folder / 'repository'}"


@pytest.mark.parametrize("make", [write_parquet, write_saved, write_hub])
def test_rows_are_read_in_order_for_any_division_into_parts(
    make: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make(tmp_path)
    expected = [Chunk(text, text.encode(), True) for text in TEXTS]
    assert read_events(name) == expected
    monkeypatch.setattr(inputs, "SMALLEST_PART", 1000)
    monkeypatch.setattr(inputs, "PARTS", 6)
    assert len(plan_parts(find_inputs([name]), "file")) > 1
    assert read_events(name) == expected
    joined = read_events(name, template="{title}: {text}")[0]
    assert isinstance(joined, Chunk)
    assert joined.text.endswith(f": {TEXTS[0]}")
    for key, reason in (("number", "must be a string. Got int"), ("body", "no field 'body'")):
        rejects = read_events(name, text_key=key)
        assert len(rejects) == len(TEXTS)
        assert isinstance(rejects[0], Reject)
        assert reason in rejects[0].reason


def test_only_the_row_with_null_is_rejected(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, *TEXTS[1:]]}), tmp_path / "a.parquet")
    first, second, *_ = read_events(str(tmp_path / "a.parquet"))
    assert first == Reject(1, "field 'text' must be a string. Got NoneType")
    assert isinstance(second, Chunk)


def test_only_the_row_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    rows = [text.encode() for text in TEXTS]
    rows[300] = b"ab\xff"
    column = pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=100)
    found = read_events(str(tmp_path / "a.parquet"))
    assert found[300] == Reject(301, "field 'text' is not UTF-8 (value 0xff at byte 3); fix the record")
    assert found[:300] + found[301:] == [Chunk(text, text.encode(), True) for text in TEXTS[:300] + TEXTS[301:]]


def test_revision_of_a_hub_dataset_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, str | None]] = []

    def dataset_info(_: object, name: str, *, revision: str | None, timeout: float) -> object:
        requests.append((name, revision))
        if name == "team/away":
            raise ConnectionError("no network")
        return SimpleNamespace(sha="0123abc")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    names = ["hf:team/text", "hf:team/text@v2:en", "hf:team/away"]
    assert [source.revision for source in find_inputs(names)] == ["0123abc", "0123abc", None]
    assert requests == [("team/text", None), ("team/text", "v2"), ("team/away", None)]


def test_error_names_the_table_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        read_events(str(tmp_path / "a.parquet"))
    both = datasets.DatasetDict({"a": datasets.Dataset.from_dict({"text": ["x"]})})
    both.save_to_disk(tmp_path / "several")
    with pytest.raises(UserError, match=r"several holds several datasets; name those to read: .*several/a"):
        find_inputs([str(tmp_path / "several")])
    with pytest.raises(UserError, match=r"hf:.*none could not be opened .*hf:REPOSITORY"):
        plan_parts(find_inputs([f"hf:{tmp_path / 'none'}"]), "file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", "{", r"state\.json: cannot be read as JSON"),
        ("state.json", "{}", r"state\.json: _data_files must be a list\. Got NoneType\."),
        ("state.json", '{"_data_files": [1]}', r"state\.json: each of _data_files must have a filename"),
        ("dataset_dict.json", '{"splits": 1}', r"dataset_dict\.json: splits must be a list\. Got int\."),
    ],
)
def test_damaged_description_of_a_saved_dataset_is_a_user_error(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{message}.*Save or copy the dataset again"):
        saved_files(tmp_path)
