"""Tests of the functions behind tools/inspect_dataset.py, and of the tool itself."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from moh_megatron.config.schema import Config
from moh_megatron.data.dataset_manifest import load_manifest
from moh_megatron.data.prepare.inspect import differences, draw_lengths, problems, sample, unverified
from moh_megatron.data.prepare.pipeline import prepare
from moh_megatron.io.errors import UserError

MakeConfig = Callable[..., Config]
TOOL = Path(__file__).parents[4] / "tools" / "inspect_dataset.py"


@pytest.fixture
def folder(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> Path:
    corpus.write_text('{"text": ""}\n' + corpus.read_text(encoding="utf-8"), encoding="utf-8")
    prepare(make_config([corpus]))
    return tmp_path / "dataset"


def test_sample_returns_the_documents(folder: Path, paragraphs: list[str]) -> None:
    found = []
    for split in ("train", "validation"):
        count = load_manifest(folder).split(split).documents
        documents = [sample(folder, split, position, 10**6) for position in range(count)]
        assert [number for number, _, _ in documents] == list(range(count))
        assert sample(folder, split, -1, 10**6) == documents[-1]
        assert sum(tokens for _, tokens, _ in documents) == load_manifest(folder).split(split).tokens
        found += [text for _, _, text in documents]
        with pytest.raises(UserError, match=rf"{split} has {count} documents. Got the position {count}"):
            sample(folder, split, count, 1)
    assert set(found) == {"", *paragraphs}
    longest = max(found, key=len)
    beginnings = []
    for split in ("train", "validation"):
        for position in range(load_manifest(folder).split(split).documents):
            if sample(folder, split, position, 10**6)[2] == longest:
                beginnings.append(sample(folder, split, position, 5)[2])
    (beginning,) = beginnings
    assert 0 < len(beginning) < len(longest)
    assert longest.startswith(beginning)


def test_problems_names_every_damaged_file(folder: Path, corpus: Path) -> None:
    assert problems(folder) == []
    for name, expected in (
        ("train.bin", "train.bin: expected sha256"),
        ("validation.idx", "validation.idx: expected sha256"),
        ("tokenizer/tokenizer.json", "not the tokenizer this dataset was made with"),
    ):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        if name.endswith(".json"):
            (folder / name).write_bytes(content + b" ")
        found = problems(folder)[0]
        assert expected in found
        (folder / name).write_bytes(content)
    for name in ("tokenizer/tokenizer_config.json", "rejects.jsonl"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b"\n")
        (found,) = problems(folder)
        assert re.search(rf"{name}: expected sha256 \w+ \({len(content):,} bytes\)\. Got \w+ \(", found)
        (folder / name).unlink()
        (found,) = problems(folder)
        assert re.search(rf"{name}: cannot be read \(No such file", found)
        (folder / name).write_bytes(content)
    assert unverified(load_manifest(folder)) == []
    corpus.write_text("other")
    (found,) = problems(folder)
    assert "the input has changed since" in found
    assert "Got" in found
    corpus.unlink()
    assert problems(folder) == []
    (line,) = unverified(load_manifest(folder))
    assert line.startswith(f"{corpus}: the input is not there")


def test_older_manifest_without_later_hashes_is_read(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    del record["others"], record["inputs"][0]["revision"]
    (folder / "manifest.json").write_text(json.dumps(record))
    assert problems(folder) == []
    assert any("older than their hashes" in line for line in unverified(load_manifest(folder)))


def test_histogram_legend_counts_the_empty_documents_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (savefig(self, path), figures.append(self)))
    draw_lengths(folder, tmp_path / "lengths.png")
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    assert legend is not None
    assert sum(text.get_text().endswith(" documents, and 1 empty, not drawn") for text in legend.get_texts()) == 1
    for axis in (axes.xaxis, axes.yaxis):
        labels = [label.get_text() for label in axis.get_ticklabels(which="both") if label.get_text()]
        assert labels
        assert all(re.fullmatch(r"[\d,]+", label) for label in labels)


def test_differences_lists_the_values_that_differ(
    folder: Path, make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    prepare(make_config([corpus], data={"dir": str(tmp_path / "other"), "validation_fraction": 0.4}))
    manifest, other = load_manifest(folder), load_manifest(tmp_path / "other")
    assert differences(manifest, manifest) == []
    lines = differences(manifest, other)
    assert "settings.validation_fraction: 0.3 -> 0.4" in lines
    assert f"train.documents: {manifest.train.documents} -> {other.train.documents}" in lines
    assert any(line.startswith("train.files[train.bin].sha256: ") for line in lines)


def test_commands_print_results_and_return_their_exit_codes(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        environment = {"PYTHONPATH": str(TOOL.parents[1]), "MPLBACKEND": "agg", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, str(TOOL), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert run("show", folder)[0] == 0
    assert "median" in run("show", folder)[1]
    assert run("histogram", folder, tmp_path / "lengths.png")[0] == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "== train document 0" in run("sample", folder, "--at", 0, -1)[1]
    assert run("verify", folder) == (0, f"{folder}: every file is as its manifest says\n")
    assert run("diff", folder, folder) == (0, "no difference\n")
    (folder / "rejects.jsonl").unlink()
    assert run("verify", folder)[0] == 2
    for arguments in (("verify", tmp_path), ("histogram", tmp_path / "missing", tmp_path / "out.png")):
        code, message = run(*arguments)
        assert code == 2
        assert "No prepared data at" in message
        assert "Traceback" not in message
    code, message = run("histogram", folder, tmp_path / "out.xyz")
    assert code == 2
    assert "must end in .png. Got" in message
    assert "Traceback" not in message
    code, message = run("histogram", folder, tmp_path / "missing" / "out.png")
    assert code == 2
    assert "must be a file to write, in a folder that is there" in message
