"""What the documents say exists: paths, commands, keys, names in the code."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import groupby
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
    rf"(?<![\w.])(?!tokenizer\.json|\w+\.(?:py|sh)\b)((?:{'|'.join(Config.__dataclass_fields__)})\.[a-z]\w*)(?=$|[=:\s])"
)
MARK = re.compile(r"#.*\bneeds (a GPU|a cluster|a network)\b")
CONSOLE_COMMANDS = dict(re.findall(r'\("(\w+)", "(\w+)"\)', (REPOSITORY / "setup.py").read_text(encoding="utf-8")))
CONSOLE_COMMANDS = {f"moh-{name}": module for name, module in CONSOLE_COMMANDS.items()}
SHELL = {"source", "export", "cat"}
"""Programs that need no test."""
RUN_BY = {"tensorboard": ("tests/integration/test_browser.py", "tensorboard.main")}
"""Programs of others, the test that runs each, and how it does so."""
PYTHONS = {"python", "python3", "pip", "torchrun"}
NOT_IN_THE_REPOSITORY = ("runs/", "my_texts/", ".venv", "corpus/", "LLAMA2/")


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def spans(name: str) -> list[str]:
    """Inline code, outside the fenced blocks."""
    return CODE.findall(FENCE.sub("", text_of(name)))


@dataclass(frozen=True)
class Command:
    """One command of a shell block."""

    words: tuple[str, ...]
    needs: str | None
    """What the document says it needs: a GPU, a cluster or a network."""

    @property
    def script(self) -> int | None:
        """The position of a script of the repository among the words, as behind python or torchrun."""
        return next((n for n, word in enumerate(self.words) if word.startswith(("pipelines/", "tools/"))), None)

    @property
    def module(self) -> str | None:
        """The module of moh_megatron.commands that the command runs: moh-plan and tools/plan.py give plan."""
        if (name := Path(self.words[0]).name) in CONSOLE_COMMANDS:
            return CONSOLE_COMMANDS[name]
        if self.script is None:
            return None
        match = re.search(r"from moh_megatron\.commands\.(\w+) import run\b", text_of(self.words[self.script]))
        return match and match[1]

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.words[(self.script or 0) + 1 :]


def commands(name: str) -> list[Command]:
    """Every command of the shell blocks. A mark on a line of its own counts up to the next empty line."""
    found = []
    for language, block in FENCE.findall(text_of(name)):
        if language != "bash":
            continue
        mark = None
        for line in block.replace("\\\n", " ").splitlines():
            own_mark = MARK.search(line)
            if not line.strip():
                mark = None
            elif line.startswith("#"):
                mark = own_mark or mark
            else:
                needs = own_mark or mark
                words = shlex.split(line, comments=True)
                for chained, part in groupby(words, key=lambda word: word in ("&&", "&", ";")):
                    if not chained:
                        found.append(Command(tuple(part), needs and needs[1]))
    return found


COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]
PACKAGE_COMMANDS = [
    pytest.param(command, id=f"{document}: {' '.join(command.words)[:80]}")
    for document, command in COMMANDS
    if command.module is not None
]
TOOL_COMMANDS = [
    pytest.param(command, id=f"{document}: {' '.join(command.words)[:80]}")
    for document, command in COMMANDS
    if command.module is None and command.script is not None
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
    words += [word for command in commands(document) for word in command.words]
    paths = {word.partition(":")[0] for word in words if re.fullmatch(r"\.?\w[\w.-]*/[\w./-]*(:\w+)?", word)}
    paths = {path for path in paths if not path.startswith(NOT_IN_THE_REPOSITORY)}
    assert paths or document == "CHANGELOG.md"
    # What a run folder or a checkpoint holds is written as a lone `name/`.
    lone = {"data/", "start/", "eval/", "tensorboard/", "profile/", "checkpoints/", "hf/", "optimizer/", "rng/"}
    assert sorted(path for path in paths - lone if existing(path) is None) == []


def test_the_layout_names_every_folder():
    (tree,) = (block for language, block in FENCE.findall(text_of("CONTRIBUTING.md")) if not language)
    named, above = set(), []
    for indent, name in re.findall(r"^( *)(\w+)/(?= |$)", tree, re.MULTILINE):
        above = [*above[: len(indent) // 2], name]
        named.add("/".join(above))
    package = REPOSITORY / "moh_megatron"
    rooms = {str(file.parent.relative_to(REPOSITORY)) for file in package.rglob("__init__.py")}
    assert {name for name in named if name.startswith(package.name)} == rooms
    assert all((REPOSITORY / name).is_dir() for name in named)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_knows_its_targets(document):
    lines = [*(command.words for command in commands(document)), *map(str.split, spans(document))]
    calls = [words for words in lines if words[0] == "make"]
    named = {words[1] for words in calls if len(words) > 1}
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert named <= targets
    variables = {word.partition("=")[0] for words in calls for word in words[2:]}
    assert variables <= set(re.findall(r"^(\w+) \?=", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_checked_by_a_test_or_says_what_it_needs(document):
    """The tests below read the commands of this project; `.ci/run` runs the targets of make."""
    unchecked = [
        " ".join(command.words)
        for command in commands(document)
        if command.needs is None
        and command.script is None
        and Path(command.words[0]).name not in {*CONSOLE_COMMANDS, *SHELL, *RUN_BY, "make"}
    ]
    assert unchecked == [], "mark them with: # needs a GPU, # needs a cluster or # needs a network"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_work_as_printed_in_a_fresh_shell(document):
    """What make setup installs is not on the path: the environment is activated first, or the path is written out."""
    outside, activated = [], False
    for command in commands(document):
        program = command.words[0]
        activated = activated or command.words == ("source", ".venv/bin/activate")
        own_environment = command.words == ("pip", "install", ".")
        if program in {*CONSOLE_COMMANDS, *RUN_BY, *PYTHONS} and not activated and not own_environment:
            outside.append(" ".join(command.words))
    assert outside == []


def test_messages_docstrings_and_comments_name_commands_that_work_as_printed():
    files = [
        *sorted(file for folder in ("moh_megatron", "tools", "slurm") for file in (REPOSITORY / folder).rglob("*.py")),
        *sorted((REPOSITORY / "configs").rglob("*.yaml")),
        *sorted((REPOSITORY / "slurm").rglob("*.sh")),
        *(REPOSITORY / name for name in DOCUMENTS),
    ]
    texts = {str(file.relative_to(REPOSITORY)): file.read_text(encoding="utf-8") for file in files}
    bare = re.compile(r"(?<![\w/.\"])python3? (?:pipelines|tools|slurm)/\S+")
    assert {name: found for name, text in texts.items() if (found := bare.findall(text))} == {}
    package = {name: text for name, text in texts.items() if name.startswith(("moh_megatron", "configs"))}
    # torchrun and Slurm start the scripts; everyone else, a message's reader too, the commands.
    scripts = {name: re.findall(r"^.*pipelines/\w+\.py.*$", text, re.MULTILINE) for name, text in package.items()}
    assert [line for lines in scripts.values() for line in lines if not line.startswith("torchrun ")] == []


def test_programs_of_others_are_run_by_the_tests_named_here():
    assert [name for name, (file, call) in RUN_BY.items() if call not in text_of(file)] == []


@pytest.mark.usefixtures("own_signal_mask")
@pytest.mark.parametrize("command", PACKAGE_COMMANDS)
def test_command_of_the_package_parses(command, monkeypatch):
    """A command with a configuration resolves it and stops; the others read their arguments."""
    module = import_module(f"moh_megatron.commands.{command.module}")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [command.words[0], *command.arguments])
    if not hasattr(module, "parse_arguments") or command.module == "prepare_data":
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--dry-run"])
        with pytest.raises(SystemExit) as ending:
            module.main()
        assert ending.value.code == 0
    else:
        module.parse_arguments()


@pytest.mark.parametrize("command", TOOL_COMMANDS)
def test_command_fits_its_tool(command):
    assert command.script is not None
    source = text_of(command.words[command.script]) + text_of("moh_megatron/cli.py")
    options = [word.partition("=")[0] for word in command.arguments if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in source] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_calls_of_make_can_be_carried_out(document):
    for command in commands(document):
        if command.words[0] == "make":
            done = subprocess.run(["make", "-n", *command.words[1:]], cwd=REPOSITORY, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_of_the_documents_compiles(document):
    for language, block in FENCE.findall(text_of(document)):
        if language == "python":
            compile(block, document, "exec")


def test_the_readme_is_short_and_the_index_lists_every_page():
    assert len(text_of("README.md").splitlines()) <= 180
    pages = {file.name for file in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(RELATIVE_LINK.findall(text_of("docs/README.md")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_keys_exist(document):
    keys = {key for span in spans(document) for key in KEY.findall(span)}
    known = set(re.findall(r"^\| `([\w.]+)`", text_of("docs/configuration.md"), re.MULTILINE))
    assert keys <= known
    for command in commands(document):
        for override in (part for word in command.words for part in word.removeprefix("ARGS=").split()):
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
    assert text_of("docs/configuration.md") == page, (
        ".venv/bin/python tools/config_reference.py > docs/configuration.md"
    )
    assert re.findall(r"^.*\|\s*\|$", page, re.MULTILINE) == [], "every key has a description"
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert rows["parallel.zero_stage"] == "integer at least 0, at most 3"
    assert rows["optimizer.decay_fraction"] == "number above 0, at most 1"
    assert rows["moh.shared_heads"] == "integer, list of lists of integers, or null"
    assert rows["generate.prompts"] == "list of text"
    assert rows["train.precision"] == "`fp32`, `bf16`"
    sections = {name: field.type for name, field in Config.__dataclass_fields__.items()}
    assert {key.split(".")[0] for key in rows} == set(sections)


def test_first_run_has_every_key_without_a_default_with_the_value_of_the_shipped_file():
    page, lines = text_of("docs/first_run.md"), text_of("configs/minimal.yaml").splitlines()
    assert len(lines) <= 20
    assert "docs/first_run.md" in text_of("README.md").partition("## Quickstart")[0]
    reference = text_of("docs/configuration.md")
    needed = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| required \|", reference, re.MULTILINE)
    needed += re.findall(r"^\| `([\w.]+)` \|.*\| Required unless", reference, re.MULTILINE)
    assert {"model.hidden_size", "moh.shared_heads", "moh.active_heads"} <= set(needed)
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert set(needed) == set(rows) - {"data.inputs"}
    config = load_config("minimal")
    values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in rows}
    shown = {key: str(value) for key, value in values.items()}
    shown |= {"data.inputs": "`my_texts/*.txt`", "run.dir": "`runs/first`", "train.total_tokens": "500 thousand"}
    assert rows == shown
    assert values["data.inputs"] == ("my_texts/*.txt",)
    assert values["train.total_tokens"] == 500_000


def test_the_check_of_the_wheel_runs_the_commands_of_first_run():
    """In short form: the same command, subcommand and run options, with fewer tokens."""
    checked = text_of("tools/check_wheel.sh").partition("docs/first_run.md")[2].replace("\\\n", " ").splitlines()
    chain = [" ".join(command.words[:2]) for command in commands("docs/first_run.md") if command.module is not None]
    assert len(chain) == 7
    run = [" ".join(line.split()[:2]) for line in checked if line.startswith("moh-")]
    assert [line for line in chain if line not in run] == []


def test_the_licence_is_apache_2():
    licence = text_of("LICENSE")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert 'license="Apache-2.0"' in text_of("setup.py")
