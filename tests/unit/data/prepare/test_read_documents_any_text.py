"""Property tests of read_documents and chunks: every record is one document or one reject."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moh_megatron.config.schema import DataConfig
from moh_megatron.data.prepare.chunks import Chunk, stream_chunks
from moh_megatron.data.prepare.inputs import Segment, find_inputs
from moh_megatron.data.prepare.read_documents import Reject, SegmentEnd, read_segment

# With surrogates, which JSON can express as \ud800.
ANY_TEXT = st.text(st.characters(), max_size=40)
ENCODABLE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TRICKY = st.text(st.sampled_from("ab \n\r\t\x00\u00a0\u0301\u1100\u1161é日👍\u2028"), max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


def documents(path: Path, stop: int | None = None, start: int = 0, **settings: object) -> list[str | int]:
    """The text of each document and the line of each reject."""
    (source,) = find_inputs([str(path)])
    found: list[str | int] = []
    text = ""
    for event in read_segment(source, Segment(0, start, stop, 0), DataConfig(**settings), lambda count: None):  # pyright: ignore[reportArgumentType]
        if isinstance(event, Reject):
            found.append(event.line)
            text = ""
        elif isinstance(event, Chunk):
            assert event.utf8 == event.text.encode()
            text += event.text
            if event.last:
                found.append(text)
                text = ""
        else:
            assert isinstance(event, SegmentEnd)
    assert not text
    return found


@given(
    texts=st.lists(ANY_TEXT | TRICKY, min_size=1, max_size=6),
    escaped=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    limit=st.integers(16, 60),
)
def test_any_text_in_jsonl_is_one_document_or_one_reject(
    folder: Path, texts: list[str], escaped: bool, end: str, limit: int
) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
    content = end.join(lines).encode("utf-8", errors="surrogatepass")
    path = folder / "any.jsonl"
    path.write_bytes(content)
    lone = [any("\ud800" <= character <= "\udfff" for character in text) for text in texts]
    expected = [line if bad else text for line, (text, bad) in enumerate(zip(texts, lone, strict=True), start=1)]
    assert documents(path, max_document_bytes=limit) == expected
    cut = len(content) // 2
    first, second = documents(path, cut), documents(path, start=max(cut, 1)) if cut else []
    texts_in_parts = [text for text in first + second if isinstance(text, str)]
    assert texts_in_parts == [text for text in expected if isinstance(text, str)]


@given(text=ENCODABLE | TRICKY, limit=st.integers(16, 60))
def test_any_text_in_txt_is_its_documents(folder: Path, text: str, limit: int) -> None:
    path = folder / "any.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert documents(path, max_document_bytes=limit) == ([text] if text.strip() else [1])
    lines = [line.rstrip("\r\n") for line in text.split("\n") if line.strip()]
    assert documents(path, max_document_bytes=limit, text_unit="line") == (lines or [1])


@given(raw=st.binary(max_size=60), unit=st.sampled_from(["file", "paragraph", "line"]))
def test_any_bytes_give_documents_or_rejects(folder: Path, raw: bytes, unit: str) -> None:
    for name in ("raw.txt", "raw.jsonl"):
        (folder / name).write_bytes(raw)
        assert documents(folder / name, text_unit=unit)


@given(text=TRICKY | ENCODABLE, limit=st.integers(16, 40), form=st.sampled_from(["none", "nfc", "nfkc"]))
def test_joined_chunks_are_the_document(text: str, limit: int, form: str) -> None:
    chunks = list(stream_chunks([text[:7], text[7:]], limit, form))
    normalised = text if form == "none" else unicodedata.normalize(form.upper(), text)  # pyright: ignore[reportArgumentType]
    assert "".join(chunk.text for chunk in chunks) == normalised
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    if form == "none":
        assert all(len(chunk.utf8) <= limit for chunk in chunks)


def test_chunks_end_at_line_ends_or_before_white_space() -> None:
    def cut(text: str) -> list[str]:
        return [chunk.text for chunk in stream_chunks([text], 16, "none")]

    assert cut("one two\nthree four five") == ["one two\n", "three four five"]
    assert cut("one two three four five") == ["one two three", " four five"]
    assert cut("x" * 20 + "é") == ["x" * 16, "xxxxé"]
    assert cut("é" * 9) == ["é" * 8, "é"]


def test_line_of_100_mb_is_read_in_bounded_chunks(folder: Path) -> None:
    path = folder / "long.txt"
    path.write_bytes((b"word " * 200_000 + b"end. ") * 100 + b"\nshort\n")
    found = []
    (source,) = find_inputs([str(path)])
    for event in read_segment(source, Segment(0, 0, None, 0), DataConfig(text_unit="line"), lambda count: None):
        if isinstance(event, Chunk):
            assert len(event.utf8) <= 1 << 20
            found.append((len(event.utf8), event.last))
    assert found[-1] == (5, True)
    assert sum(size for size, _ in found[:-1]) == 100_000_500
    assert [last for _, last in found].count(True) == 2
    path = path.rename(folder / "long.jsonl")
    assert documents(path) == [1, 2]
