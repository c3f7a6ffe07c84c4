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
from moh_megatron.io.errors import UserError

TEXTS = [f"Text {number} é." * 20 for number in range(500)]


def read(name: str, **settings: str) -> list[Event]:
    """All events of an input, part by part, without the ends of segments."""
    found = find_inputs([name])
    parts = plan_parts(found, "file")
    data = DataConfig(**settings)  # pyright: ignore[reportArgumentType]
    events = [event for part in parts for each in part for event in read_segment(found[0], each, data, lambda n: None)]
    assert sum(event.lines for event in events if isinstance(event, SegmentEnd)) == len(TEXTS)
    return [event for event in events if not isinstance(event, SegmentEnd)]


def parquet(folder: Path) -> str:
    path = folder / "table.parquet"
    table = pyarrow.table({"text": TEXTS, "title": [str(number) for number in range(500)], "number": list(range(500))})
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    return str(path)


def saved(folder: Path) -> str:
    table = {"text": TEXTS, "title": [str(number) for number in range(500)], "number": list(range(500))}
    datasets.Dataset.from_dict(table).save_to_disk(folder / "saved")
    return str(folder / "saved")


def hub(folder: Path) -> str:
    """``datasets`` opens a folder as it opens a repository."""
    (folder / "repository").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": TEXTS[250 * number :][:250], "title": ["t"] * 250, "number": [1] * 250})
        pyarrow.parquet.write_table(table, folder / "repository" / f"train-{number}.parquet")
    return f"hf:{folder / 'repository'}"


@pytest.mark.parametrize("make", [parquet, saved, hub])
def test_rows_in_order_whatever_the_parts(
    make: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make(tmp_path)
    expected = [Chunk(text, text.encode(), True) for text in TEXTS]
    assert read(name) == expected
    monkeypatch.setattr(inputs, "SMALLEST_PART", 1000)
    monkeypatch.setattr(inputs, "PARTS", 6)
    assert len(plan_parts(find_inputs([name]), "file")) > 1
    assert read(name) == expected
    template = read(name, template="{title}: {text}")[0]
    assert isinstance(template, Chunk)
    assert template.text.endswith(f": {TEXTS[0]}")
    for key, reason in (("number", "must be a string. Got int"), ("body", "no field 'body'")):
        rejects = read(name, text_key=key)
        assert len(rejects) == len(TEXTS)
        assert isinstance(rejects[0], Reject)
        assert reason in rejects[0].reason


def test_null_is_rejected_alone(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, *TEXTS[1:]]}), tmp_path / "a.parquet")
    first, second, *_ = read(str(tmp_path / "a.parquet"))
    assert first == Reject(1, "field 'text' must be a string. Got NoneType")
    assert isinstance(second, Chunk)


def test_bytes_that_are_not_utf8_are_rejected_alone(tmp_path: Path) -> None:
    rows = [text.encode() for text in TEXTS]
    rows[300] = b"ab\xff"
    column = pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=100)
    found = read(str(tmp_path / "a.parquet"))
    assert found[300] == Reject(301, "field 'text' is not UTF-8 (value 0xff at byte 3); mend the record")
    assert found[:300] + found[301:] == [Chunk(text, text.encode(), True) for text in TEXTS[:300] + TEXTS[301:]]


def test_the_revision_of_a_hub_dataset_is_that_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def dataset_info(_: object, name: str, *, revision: str | None, timeout: float) -> object:
        asked.append((name, revision))
        if name == "team/away":
            raise ConnectionError("no network")
        return SimpleNamespace(sha="0123abc")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    names = ["hf:team/text", "hf:team/text@v2:en", "hf:team/away"]
    assert [each.revision for each in find_inputs(names)] == ["0123abc", "0123abc", None]
    assert asked == [("team/text", None), ("team/text", "v2"), ("team/away", None)]


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        list(
            read_segment(find_inputs([str(tmp_path / "a.parquet")])[0], inputs.Segment(0, 0, None, 1), DataConfig(), id)
        )
    both = datasets.DatasetDict({"a": datasets.Dataset.from_dict({"text": ["x"]})})
    both.save_to_disk(tmp_path / "several")
    with pytest.raises(UserError, match=r"several holds several datasets; name those to read: .*several/a"):
        find_inputs([str(tmp_path / "several")])
    with pytest.raises(UserError, match=r"hf:.*none could not be opened .*hf:REPOSITORY"):
        plan_parts(find_inputs([f"hf:{tmp_path / 'none'}"]), "file")
