import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moh_megatron.config.errors import UserError
from moh_megatron.config.schema import Config
from moh_megatron.data.inspect import differences, problems, sample
from moh_megatron.data.manifest import load_manifest
from moh_megatron.data.prepare import prepare

MakeConfig = Callable[..., Config]
TOOL = Path(__file__).parents[3] / "tools" / "inspect_dataset.py"


@pytest.fixture
def folder(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> Path:
    corpus.write_text('{"text": ""}\n' + corpus.read_text(encoding="utf-8"), encoding="utf-8")
    prepare(make_config([corpus]))
    return tmp_path / "dataset"


def test_samples_are_the_documents(folder: Path, corpus: Path) -> None:
    texts = {json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()}
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
    assert set(found) == texts
    longest = max(found, key=len)
    split, place = next(
        (s, p) for s in ("train", "validation") for p in range(99) if sample(folder, s, p, 10**6)[2] == longest
    )
    assert longest.startswith(sample(folder, split, place, 5)[2])


def test_every_damage_is_found(folder: Path, corpus: Path) -> None:
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
        (found, *_) = problems(folder)
        assert expected in found
        (folder / name).write_bytes(content)
    corpus.write_text("other")
    assert "the input has changed since" in problems(folder)[0]


def test_the_difference_of_two_manifests(folder: Path, make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    prepare(make_config([corpus], data={"dir": str(tmp_path / "other"), "validation_fraction": 0.4}))
    here, there = load_manifest(folder), load_manifest(tmp_path / "other")
    assert differences(here, here) == []
    lines = differences(here, there)
    assert "settings.validation_fraction: 0.3 -> 0.4" in lines
    assert f"train.documents: {here.train.documents} -> {there.train.documents}" in lines
    assert any(line.startswith("train.files[train.bin].sha256: ") for line in lines)


def test_the_commands(folder: Path, tmp_path: Path) -> None:
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
    code, message = run("verify", tmp_path)
    assert code == 2
    assert "No prepared data at" in message
