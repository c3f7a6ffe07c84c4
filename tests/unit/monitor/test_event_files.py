"""Under which names TensorBoard shows runs, and event files that an earlier version wrote to a folder of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.util.tensor_util import make_ndarray

from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config
from moh_megatron.monitor.event_files import event_folder
from moh_megatron.monitor.run_folder import open_run
from moh_megatron.monitor.tensorboard import TensorBoard


def write_steps(folder: Path, start: int, end: int, loss: float) -> None:
    """Write the steps start + 1 to end, as a run does between two restarts."""
    before = set(folder.glob("events.out.tfevents.*")) | set(folder.glob("*/events.out.tfevents.*"))
    writer = TensorBoard(folder, start)
    for step in range(start + 1, end + 1):
        writer.scalars({"loss/lm": loss}, step)
    writer.text("alarms", f"dead heads: from {start}", start)
    writer.close()
    # TensorBoard reads files in the order of their names, which hold the second and, within one process, a count.
    (written,) = {
        file for file in folder.glob("events.out.tfevents.*") if file.name not in {old.name for old in before}
    }
    written.rename(folder / f"events.out.tfevents.part{len(before)}")


def multiplexer(folder: Path) -> EventMultiplexer:
    """What ``tensorboard --logdir folder`` reads."""
    found = EventMultiplexer().AddRunsFromDirectory(str(folder))
    found.Reload()
    return found


def run_names(folder: Path) -> list[str]:
    provider = MultiplexerDataProvider(multiplexer(folder), str(folder))
    return sorted(run.run_name for run in provider.list_runs(RequestContext(), experiment_id=""))


def curve(folder: Path, run: str) -> list[tuple[int, float]]:
    events = multiplexer(folder).Tensors(run, "loss/lm")
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events]


@pytest.fixture
def earlier(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """The run folder ``runs/old`` of an earlier version: event files of five steps in a folder of their own."""
    folder = tmp_path / "runs" / "old"
    write_steps(folder / "tensorboard", 0, 5, 4.0)
    (folder / "config.yaml").write_text(dump_config(tiny()))
    return folder


def test_tensorboard_calls_a_run_by_the_name_of_its_folder(tmp_path: Path) -> None:
    for name in ("smoke", "dense"):
        write_steps(tmp_path / "runs" / name, 0, 2, 4.0)
    assert run_names(tmp_path / "runs") == ["dense", "smoke"]


def test_a_resumed_run_of_an_earlier_version_is_one_run_with_one_curve(earlier: Path) -> None:
    assert run_names(earlier.parent) == ["old/tensorboard"]
    write_steps(earlier, 3, 7, 2.0)
    assert run_names(earlier.parent) == ["old"]
    assert curve(earlier.parent, "old") == [(step, 4.0 if step <= 3 else 2.0) for step in range(1, 8)]
    assert [message for _, message in open_run(earlier).alarms] == ["dead heads: from 0", "dead heads: from 3"]
    assert not (earlier / "tensorboard").exists()


def test_a_run_of_an_earlier_version_is_read_where_it_is(earlier: Path) -> None:
    assert event_folder(earlier) == earlier / "tensorboard"
    assert open_run(earlier).series("loss/lm") == [(step, 4.0) for step in range(1, 6)]
    assert [message for _, message in open_run(earlier).alarms] == ["dead heads: from 0"]


def test_other_files_of_the_earlier_folder_stay(earlier: Path) -> None:
    (earlier / "tensorboard" / "rank0.pt.trace.json").write_text("{}")
    write_steps(earlier, 5, 6, 2.0)
    assert [file.name for file in (earlier / "tensorboard").iterdir()] == ["rank0.pt.trace.json"]
    assert run_names(earlier.parent) == ["old"]
    assert event_folder(earlier) == earlier


def test_a_run_without_event_files_has_no_alarms(tiny: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny()))
    assert open_run(tmp_path).alarms == []
