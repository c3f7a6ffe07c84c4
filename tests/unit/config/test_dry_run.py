"""Tests --dry-run with every configuration that the repository ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from moh_megatron.commands import pretrain
from moh_megatron.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGURATIONS = sorted(
    path.relative_to(REPOSITORY) for path in (REPOSITORY / "configs").rglob("*.yaml") if path.parent.name != "eval"
)


def test_shipped_configurations_are_found() -> None:
    assert len(CONFIGURATIONS) >= 7


@pytest.mark.usefixtures("own_signal_mask")
@pytest.mark.parametrize("path", CONFIGURATIONS, ids=str)
def test_dry_run_prints_an_equal_configuration(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["pretrain.py", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as ending:
        pretrain.main()
    assert ending.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(printed) == load_config(path)
