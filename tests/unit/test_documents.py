"""What the documents say exists: paths, commands, keys, names in the code."""

import ast
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest

from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{file.name}" for file in (REPOSITORY / "docs").glob("*.md")),
    "configs/data/README.md",
    "slurm/README.md",
)
WITH_PATHS = [name for name in DOCUMENTS if name != "docs/monitoring.md"]
"""There, what looks like a path is the name of a scalar."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
RELATIVE_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
REFERENCE = re.compile(r"([\w./]+\.py):(\w+)")
KEY = re.compile(
    rf"\b(?!tokenizer\.json|\w+\.(?:py|sh)\b)((?:{'|'.join(Config.__dataclass_fields__)})\.[a-z]\w*)(?=$|[=:\s])"
)
NOT_IN_THE_REPOSITORY = ("runs/", ".venv", "corpus/", "LLAMA2/")


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def spans(name: str) -> list[str]:
    """Inline code, outside the fenced blocks."""
    return CODE.findall(FENCE.sub("", text_of(name)))


def commands(name: str) -> list[list[str]]:
    """The words of every line in the shell blocks, without comments."""
    shell = "".join(block for language, block in FENCE.findall(text_of(name)) if language == "bash")
    return [words for line in shell.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


PIPELINE_COMMANDS = [
    pytest.param(words, id=" ".join(words[1:3]))
    for document in DOCUMENTS
    for words in commands(document)
    if any("pipelines/" in word for word in words)
]
TOOL_COMMANDS = [
    pytest.param(words, id=" ".join(words[1:3]))
    for document in DOCUMENTS
    for words in commands(document)
    if any(word.startswith("tools/") for word in words)
]


def existing(path: str) -> Path | None:
    """A path from the root, or from the package as CONTRIBUTING writes it."""
    return next((root / path for root in (REPOSITORY, REPOSITORY / "moh_megatron") if (root / path).exists()), None)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    folder = (REPOSITORY / document).parent
    assert [link for link in RELATIVE_LINK.findall(text_of(document)) if not (folder / link).exists()] == []


@pytest.mark.parametrize("document", WITH_PATHS)
def test_paths_exist(document):
    words = [word for span in spans(document) for word in span.split()]
    words += [word for command in commands(document) for word in command]
    paths = {word.partition(":")[0] for word in words if re.fullmatch(r"\.?\w[\w.-]*/[\w./-]*(:\w+)?", word)}
    paths = {path for path in paths if not path.startswith(NOT_IN_THE_REPOSITORY)}
    assert paths or document == "CHANGELOG.md"
    # What a run folder or a checkpoint holds is written as a lone `name/`.
    lone = {"data/", "eval/", "tensorboard/", "checkpoints/", "hf/", "optimizer/", "rng/"}
    assert sorted(path for path in paths - lone if existing(path) is None) == []


def test_the_layout_names_every_folder():
    (tree,) = (block for language, block in FENCE.findall(text_of("README.md")) if not language)
    named = re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE)
    inner = {name for indent, name in named if indent}
    package = REPOSITORY / "moh_megatron"
    assert inner == {file.parent.name for file in package.glob("*/__init__.py")}
    assert all((REPOSITORY / name).is_dir() for indent, name in named if not indent)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_knows_its_targets(document):
    calls = [words for words in [*commands(document), *map(str.split, spans(document))] if words[0] == "make"]
    named = {words[1] for words in calls if len(words) > 1}
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert named <= targets
    variables = {word.partition("=")[0] for words in calls for word in words[2:]}
    assert variables <= set(re.findall(r"^(\w+) \?=", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("words", PIPELINE_COMMANDS)
def test_a_command_fits_its_script(words):
    place = next(index for index, word in enumerate(words) if word.startswith("pipelines/"))
    script, arguments = words[place], words[place + 1 :]
    source = text_of(script) + text_of("moh_megatron/cli.py")
    assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
    if script == "pipelines/convert.py":
        assert f'"{arguments[0]}"' in source
    elif script != "pipelines/evaluate.py":
        load_config(REPOSITORY / arguments[0], [word for word in arguments if re.match(r"\w+\.\w+=", word)])


@pytest.mark.parametrize("words", TOOL_COMMANDS)
def test_a_command_fits_its_tool(words):
    place = next(index for index, word in enumerate(words) if word.startswith("tools/"))
    source = text_of(words[place])
    assert [word for word in words[place + 1 :] if word.startswith("--") and f'"{word}"' not in source] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_keys_exist(document):
    keys = {key for span in spans(document) for key in KEY.findall(span)}
    known = set(re.findall(r"^\| `([\w.]+)`", text_of("docs/configuration.md"), re.MULTILINE))
    assert keys <= known
    for words in commands(document):
        for override in (part for word in words for part in word.removeprefix("ARGS=").split()):
            if re.match(r"\w+\.\w+=", override):
                assert override.startswith("deepspeed.") or override.partition("=")[0] in known


@cache
def names_in(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_tour_names_what_is_there():
    references = [
        match for span in spans("CONTRIBUTING.md") for match in REFERENCE.findall(span) if span != "file.py:name"
    ]
    assert len(references) > 30
    missing = []
    for path, name in references:
        file = existing(path)
        if file is None or name not in names_in(file):
            missing.append(f"{path}:{name}")
    assert missing == []


def test_the_arrows_are_those_of_the_test():
    arrows = runpy.run_path(str(Path(__file__).with_name("test_imports.py")))["ARROWS"]
    (drawn,) = (block for language, block in FENCE.findall(text_of("CONTRIBUTING.md")) if language == "mermaid")
    pairs = re.findall(r"(\w+) --> (.+)", drawn)
    assert {area: set(others.split(" & ")) for area, others in pairs} == {area: to for area, to in arrows.items() if to}


def test_the_reference_of_the_configuration_is_current():
    page = runpy.run_path(str(REPOSITORY / "tools" / "config_reference.py"))["reference"]()
    assert text_of("docs/configuration.md") == page, "python tools/config_reference.py > docs/configuration.md"
    assert re.findall(r"^.*\|\s*\|$", page, re.MULTILINE) == [], "every key has a description"
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert rows["parallel.zero_stage"] == "integer at least 0, at most 3"
    assert rows["optimizer.decay_fraction"] == "number above 0, at most 1"
    assert rows["moh.shared_heads"] == "integer, list of lists of integers, or null"
    assert rows["generate.prompts"] == "list of text"
    assert rows["train.precision"] == "`fp32`, `bf16`"
    sections = {name: field.type for name, field in Config.__dataclass_fields__.items()}
    assert {key.split(".")[0] for key in rows} == set(sections)


def test_the_licence_is_apache_2():
    licence = text_of("LICENSE")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert 'license="Apache-2.0"' in text_of("setup.py")
