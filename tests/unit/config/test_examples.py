"""The shipped configurations and suites: which file a name means, from any folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moh_megatron.config.examples import find_config, find_suite, shipped_file
from moh_megatron.config.load import load_config
from moh_megatron.evaluate.suite import load_suite
from moh_megatron.io.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("smoke", "smoke.yaml"),
        ("llm_b_moh75", "pretrain/llm_b_moh75.yaml"),
        ("llama3_8b_stage1", "continue_tune/llama3_8b_stage1.yaml"),
        ("paper_mixture", "data/paper_mixture.yaml"),
    ],
)
def test_example_is_found_by_name_from_any_folder(name: str, file: str) -> None:
    assert find_config(name) == CONFIGS / file
    assert load_config(name) == load_config(CONFIGS / file)


@pytest.mark.parametrize("path", ["mine.yaml", "nested/smoke", "./nested/smoke.yaml", "/nowhere/smoke", "smoke.yaml"])
def test_path_is_taken_as_it_is_whether_it_exists_or_not(path: str) -> None:
    assert find_config(path) == Path(path)
    assert find_suite(path) == Path(path)


def test_file_in_the_current_folder_goes_before_an_example(elsewhere: Path) -> None:
    (elsewhere / "smoke").write_text("base: other.yaml\n")
    assert find_config("smoke") == Path("smoke")


def test_folder_in_the_current_folder_does_not_hide_an_example(elsewhere: Path) -> None:
    (elsewhere / "smoke").mkdir()
    assert find_config("smoke") == CONFIGS / "smoke.yaml"
    (elsewhere / "runs").mkdir()
    with pytest.raises(UserError, match=r"^runs: cannot be read: Is a directory\.$"):
        load_config("runs")


@pytest.mark.parametrize("find", [shipped_file, find_config, find_suite])
def test_missing_path_below_configs_means_the_shipped_file(find, elsewhere: Path) -> None:
    assert find("configs/eval/offline.yaml") == CONFIGS / "eval/offline.yaml"
    assert find("configs/absent.yaml") == Path("configs/absent.yaml")
    own = elsewhere / "configs/eval/offline.yaml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert find("configs/eval/offline.yaml") == Path("configs/eval/offline.yaml")


def test_input_data_of_an_example_is_found_from_any_folder() -> None:
    (pattern,) = load_config("smoke").data.inputs
    assert shipped_file(pattern) == CONFIGS / "data/austen.jsonl.gz"


def test_unknown_name_is_refused_with_the_nearest_example() -> None:
    expected = "llm_b_moh57: no such file, and no example of that name. Did you mean the example llm_b_moh75? The "
    with pytest.raises(UserError, match=f"^{re.escape(expected)}examples are: .*smoke") as caught:
        load_config("llm_b_moh57")
    assert "offline" not in str(caught.value)
    with pytest.raises(UserError, match=r"^zzz: no such file, and no example of that name\. The examples are: "):
        load_config("zzz")


@pytest.mark.parametrize("name", ["offline", "paper_6", "paper_14"])
def test_suite_is_found_by_name_and_is_no_configuration(name: str) -> None:
    assert find_suite(name) == CONFIGS / "eval" / f"{name}.yaml"
    assert load_suite(Path(name)).name == name
    with pytest.raises(UserError, match=f"^{name}: no such file, and no example of that name"):
        find_config(name)


def test_unknown_suite_is_refused_with_the_nearest_one() -> None:
    expected = "ofline: no such file, and no suite of that name. Did you mean the suite offline? The suites are: "
    with pytest.raises(UserError, match=f"^{re.escape(expected)}offline, paper_14, paper_6\\.$"):
        load_suite(Path("ofline"))
    with pytest.raises(UserError, match="no suite of that name"):
        find_suite("smoke")


def test_names_of_examples_are_unique() -> None:
    names = [file.stem for file in CONFIGS.rglob("*.yaml")]
    assert len(names) == len(set(names))
