"""Tests --dry-run with every configuration that the repository ships."""

from __future__ import annotations

import signal
from pathlib import Path
from types import ModuleType

import pytest

from moh_megatron.commands import continue_tune, pretrain
from moh_megatron.config.load import load_config
from moh_megatron.train.fault_tolerance.signals import STOP_SIGNALS

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGURATIONS = sorted(
    path.relative_to(REPOSITORY) for path in (REPOSITORY / "configs").rglob("*.yaml") if path.parent.name != "eval"
)


def test_shipped_configurations_are_found() -> None:
    assert len(CONFIGURATIONS) >= 7


@pytest.mark.parametrize("command", [pretrain, continue_tune])
def test_signals_end_a_command_that_reads_its_configuration(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []

    def read(parser: object) -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "parse_config", read)
    assert command.run() == 130
    assert not masks[0] & {*STOP_SIGNALS}


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
