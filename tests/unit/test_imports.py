"""The house rules that a machine can check: who imports whom, and how long a file may be."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import accumulate
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "moh_megatron"

# An area may import itself and these. An arrow that is used no more is taken out here, too.
ARROWS = {
    "io": set(),
    "config": {"io"},
    "cli": {"config", "io"},
    "commands": {
        "checkpoint",
        "cli",
        "config",
        "data",
        "evaluate",
        "io",
        "monitor",
        "plan",
        "run_report",
        "train",
        "upcycle",
    },
    "parallel": set(),
    "monitor": {"config", "io"},
    "data": {"config", "io"},
    "moh": {"config", "parallel"},
    "hf": {"checkpoint"},
    "model": {"config", "io", "moh", "parallel"},
    "checkpoint": {"config", "data", "io", "model", "parallel"},
    "evaluate": {"checkpoint", "config", "data", "io", "model", "moh"},
    "train": {"checkpoint", "cli", "config", "data", "evaluate", "io", "model", "moh", "monitor", "parallel"},
    "plan": {"config", "io", "monitor", "train"},
    "run_report": {"evaluate", "monitor"},
    "upcycle": {"checkpoint", "config", "data", "io", "model", "monitor", "parallel", "train"},
}

# A library stays where it is wrapped: files or folders below moh_megatron/.
LIBRARIES = {
    "deepspeed": {"train/engine.py"},
    "megatron": {"moh/attention.py", "model", "parallel", "data/blend.py", "data/dataset.py"},
    "transformers": {"checkpoint/hf", "hf.py"},
    "tokenizers": {
        "checkpoint/hf/hf_tokenizer.py",
        "data/tokenizer/byte_level_bpe.py",
        "data/tokenizer/grow.py",
        "data/tokenizer/combining_marks.py",
        "data/tokenizer/sentencepiece_json.py",
        "data/tokenizer/tokenizer.py",
    },
    "sentencepiece": {"data/tokenizer/sentencepiece_bpe.py", "data/tokenizer/sentencepiece_json.py"},
    "safetensors": {
        "checkpoint/async_saver.py",
        "checkpoint/hf/transformers_io.py",
        "checkpoint/optimizer_state.py",
        "checkpoint/weights.py",
    },
    "tensorboard": {"monitor/run_folder.py", "monitor/tensorboard.py"},
    "lm_eval": {"evaluate/harness.py", "evaluate/lm_eval_models.py"},
    "prometheus_client": {"monitor/prometheus.py"},
    "scipy": {"evaluate/paired_test.py"},
    "triton": {"moh/backends/triton_kernel.py"},
    "datasets": {"data/prepare/tables.py"},
    "pyarrow": {"data/prepare/lines.py"},
    "pydantic": {
        "config",
        "data/dataset_manifest.py",
        "evaluate/suite.py",
        "monitor/run_folder.py",
        "train/deepspeed_config.py",
    },
    "yaml": {"config/core_yaml.py"},
    "tqdm": {"evaluate/harness.py", "io/console.py"},
}
HEAVY = {"torch", "megatron", "deepspeed", "transformers", "datasets"}
SLOW = HEAVY | {"tensorboard", "lm_eval", "scipy"}
COMMANDS = [
    file for folder in ("pipelines", f"{PACKAGE}/commands") for file in sorted((REPOSITORY / folder).glob("*.py"))
]
LONGEST_FILE, LONGEST_PIPELINE = 400, 100
MOST_FILES_OF_A_FOLDER = 20
DECLARATIVE = {"moh_megatron/config/schema.py"}
"""Files that only declare may be longer."""
FOLDERS = (PACKAGE, "pipelines", "slurm", "tools", "tests")
SOURCES = [file for folder in FOLDERS for file in sorted((REPOSITORY / folder).rglob("*.py"))]
MODULES = [file for file in SOURCES if file.is_relative_to(REPOSITORY / PACKAGE)]


def name_of(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def imports(file: Path, tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that the nodes below ``tree`` import; ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = file.relative_to(REPOSITORY).parts[:-level] if level else ()
                base = ".".join([*above, *([module] if module else [])])
                yield from (f"{base}.{each.name}" for each in names)


def all_imports(file: Path) -> set[str]:
    return set(imports(file, ast.parse(file.read_text(encoding="utf-8"))))


def area(file: Path) -> str:
    """config for moh_megatron/config/load.py, cli for moh_megatron/cli.py."""
    return file.relative_to(REPOSITORY / PACKAGE).parts[0].removesuffix(".py")


def library(imported: str) -> str:
    return "tensorboard" if imported.startswith("torch.utils.tensorboard") else imported.split(".")[0]


def test_no_arrow_between_areas_but_those_of_the_table():
    found: dict[str, set[str]] = {name: set() for name in ARROWS}
    for file in MODULES:
        if file.parent == REPOSITORY / PACKAGE and file.name == "__init__.py":
            assert not all_imports(file), "importing the package must load nothing"
            continue
        ours = {each.split(".")[1] for each in all_imports(file) if each.startswith(f"{PACKAGE}.")}
        found.setdefault(area(file), set()).update(ours - {area(file)})
    assert found == ARROWS


def test_the_arrows_form_no_circle():
    TopologicalSorter(ARROWS).prepare()


def test_modules_import_each_other_without_a_circle():
    imported = {
        file: {module for name in all_imports(file) for module in [imported_module(name)] if module not in (None, file)}
        for file in MODULES
    }
    TopologicalSorter(imported).prepare()


def test_checkpoints_do_not_depend_on_hugging_face_folders():
    files = (REPOSITORY / PACKAGE / "checkpoint").glob("*.py")
    imported = {name for file in files for name in all_imports(file)}
    assert not {name for name in imported if name.startswith(f"{PACKAGE}.checkpoint.hf")}


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_a_library_is_imported_only_where_it_is_wrapped(name):
    users = {
        file.relative_to(REPOSITORY / PACKAGE)
        for file in MODULES
        if name in {library(imported) for imported in all_imports(file)}
    }
    homes = {Path(home) for home in LIBRARIES[name]}
    assert [str(user) for user in users if not any(user.is_relative_to(home) for home in homes)] == []
    assert [str(home) for home in homes if not any(user.is_relative_to(home) for user in users)] == [], "used no more"


def test_configuration_needs_neither_torch_nor_another_area():
    files = [*(REPOSITORY / PACKAGE / "config").glob("*.py")]
    assert {library(each) for file in files for each in all_imports(file)}.isdisjoint(HEAVY)


def test_the_exported_model_code_stands_alone():
    folder = REPOSITORY / PACKAGE / "checkpoint" / "hf" / "hf_model"
    own = ".".join(folder.relative_to(REPOSITORY).parts)
    outside = {each for file in folder.glob("*.py") for each in all_imports(file) if not each.startswith(f"{own}.")}
    assert not {each for each in outside if each.startswith(PACKAGE)}
    assert HEAVY & {library(each) for each in outside} == {"torch", "transformers"}


@pytest.mark.parametrize("file", [file for file in SOURCES if "tests" not in file.parts], ids=name_of)
def test_nothing_imports_scripts_or_tests(file):
    assert {library(each) for each in all_imports(file)}.isdisjoint({"pipelines", "tools", "slurm", "tests", "support"})


def module_file(dotted: str) -> Path | None:
    """The file of a module of ours, None for a name inside one."""
    path = REPOSITORY.joinpath(*dotted.split("."))
    return next((each for each in (path / "__init__.py", path.with_suffix(".py")) if each.is_file()), None)


def imported_module(dotted: str) -> Path | None:
    """The file that ``dotted``, a module of ours or a name inside one, is imported from; None for a library."""
    if not dotted.startswith(f"{PACKAGE}."):
        return None
    return module_file(dotted) or module_file(dotted.rpartition(".")[0])


def imported_at_once(file: Path, seen: set[Path]) -> Iterator[str]:
    """What importing ``file`` imports right away, through modules of ours; functions' own imports come later."""
    if file in seen:
        return
    seen.add(file)
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            continue
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue  # It is false where the program runs.
        for imported in imports(file, statement):
            yield imported
            for prefix in accumulate(imported.split("."), "{}.{}".format):
                if prefix.startswith(PACKAGE) and (module := module_file(prefix)):
                    yield from imported_at_once(module, seen)


@pytest.mark.parametrize("file", COMMANDS, ids=name_of)
def test_a_command_reads_its_arguments_before_anything_slow_is_loaded(file):
    assert {library(each) for each in imported_at_once(file, set())}.isdisjoint(SLOW)


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_no_file_is_long_or_left_unfinished(file):
    text = file.read_text(encoding="utf-8")
    longest = LONGEST_PIPELINE if file.parent.name == "pipelines" else LONGEST_FILE
    assert len(text.splitlines()) <= longest or name_of(file) in DECLARATIVE
    assert re.findall(r"\b(?:TO" r"DO|FIX" r"ME|NotImplemented" r"Error)\b", text) == []


def test_no_folder_of_the_package_holds_too_many_files():
    counts = Counter(str(file.parent.relative_to(REPOSITORY)) for file in MODULES)
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES_OF_A_FOLDER} == {}
