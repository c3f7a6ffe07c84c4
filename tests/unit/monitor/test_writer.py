"""Failing writers are left out with one warning; the file for Prometheus and the calls of Weights & Biases."""

import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from moh_megatron.io.errors import Fault
from moh_megatron.monitor.prometheus import PrometheusFile
from moh_megatron.monitor.tensorboard import TensorBoard
from moh_megatron.monitor.wandb import WeightsAndBiases
from moh_megatron.monitor.writer import Writers


def warnings(caplog):
    """The messages that the writers logged; they are warnings."""
    records = [record for record in caplog.records if record.name.startswith("moh_megatron")]
    assert {record.levelname for record in records} <= {"WARNING"}
    return [record.getMessage() for record in records]


def use(writers):
    writers.scalars({"loss/lm": 2.5}, 1)
    writers.text("note", "words", 1)
    writers.image("map", np.zeros((2, 2, 1), np.uint8), 1)
    writers.histogram("load", [0.5, 1.0], 1)
    writers.hyperparameters({"a": 1}, {"b": 2.0})
    writers.flush()


def test_a_writer_without_its_folder_is_named_and_the_others_go_on(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    makers = {
        "TensorBoard": lambda: TensorBoard(tmp_path / "file" / "tensorboard", 0),
        "the file for Prometheus": lambda: PrometheusFile(tmp_path / "metrics.prom", "run"),
    }
    writers = Writers(makers)
    use(writers)
    writers.close()
    (warning,) = warnings(caplog)
    assert warning.startswith("TensorBoard: ")
    assert str(tmp_path / "file") in warning
    assert warning.endswith("Training goes on without it.")
    assert 'moh_loss_lm{run="run"} 2.5' in (tmp_path / "metrics.prom").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_reported_once(tmp_path, caplog):
    writers = Writers({"TensorBoard": lambda: TensorBoard(tmp_path, 0)})
    (file,) = tmp_path.iterdir()  # TensorBoard opens it again for every write, at any moment.
    (full := tmp_path / "full").symlink_to("/dev/full")
    full.replace(file)
    for _ in range(3):
        use(writers)
    writers.close()
    (warning,) = warnings(caplog)
    assert "No space left on device" in warning
    assert str(tmp_path) in warning


def test_errors_of_the_writing_thread_only_are_ignored_while_the_writer_is_open(tmp_path, monkeypatch):
    reported = []
    hook = reported.append
    monkeypatch.setattr(threading, "excepthook", hook)

    def fail():
        raise OSError("of another thread")

    writer = TensorBoard(tmp_path, 0)
    other = threading.Thread(target=fail)
    other.start()
    other.join()
    assert [str(arguments.exc_value) for arguments in reported] == ["of another thread"]
    writer.close()
    assert threading.excepthook is hook
    (tmp_path / "file").write_text("")
    with pytest.raises(Fault):
        TensorBoard(tmp_path / "file" / "tensorboard", 0)
    assert threading.excepthook is hook


def test_prometheus_format(tmp_path):
    path = tmp_path / "new" / "run.prom"
    writer = PrometheusFile(path, 'my "run"')
    writer.scalars({"head_load/layer_00/head_01": 0.5, "loss/lm": float("nan")}, 7)
    writer.scalars({"optimizer/lr": float("inf")}, 8)
    assert path.read_text() == "", "nothing is written before flush"
    writer.flush()
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# HELP ")]
    assert lines == [
        "# TYPE moh_head_load_layer_00_head_01 gauge",
        'moh_head_load_layer_00_head_01{run="my \\"run\\""} 0.5',
        "# TYPE moh_loss_lm gauge",
        'moh_loss_lm{run="my \\"run\\""} NaN',
        "# TYPE moh_step gauge",
        'moh_step{run="my \\"run\\""} 8.0',
        "# TYPE moh_optimizer_lr gauge",
        'moh_optimizer_lr{run="my \\"run\\""} +Inf',
    ]
    use(writer)
    assert [file.name for file in path.parent.iterdir()] == ["run.prom"]


def test_calls_of_weights_and_biases(tmp_path, monkeypatch):
    logged, defined = [], []
    run = SimpleNamespace(
        define_metric=lambda name, **options: defined.append((name, options)),
        log=logged.append,
        config=SimpleNamespace(update=lambda settings, allow_val_change: logged.append(("config", settings))),
        summary=SimpleNamespace(update=lambda results: logged.append(("summary", results))),
        finish=lambda: logged.append("finished"),
    )
    made = []
    library = SimpleNamespace(
        init=lambda **options: made.append(options) or run,
        Table=lambda columns, data: ("table", data),
        Image=lambda pixels: ("image", pixels.shape),
        Histogram=lambda values: ("histogram", values),
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    writer = WeightsAndBiases("moh", tmp_path / "run")
    use(writer)
    writer.close()
    assert (made[0]["project"], made[0]["name"], made[0]["resume"]) == ("moh", "run", "allow")
    assert defined == [("step", {}), ("*", {"step_metric": "step"})], "otherwise W&B drops figures of earlier steps"
    assert logged == [
        {"loss/lm": 2.5, "step": 1},
        {"note": ("table", [[1, "words"]]), "step": 1},
        {"map": ("image", (2, 2)), "step": 1},
        {"load": ("histogram", [0.5, 1.0]), "step": 1},
        ("config", {"a": 1}),
        ("summary", {"b": 2.0}),
        "finished",
    ]


def test_a_missing_library_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    writers = Writers({"Weights & Biases": lambda: WeightsAndBiases("moh", tmp_path)})
    use(writers)
    (warning,) = warnings(caplog)
    assert "monitor.wandb_project needs the package wandb: pip install wandb" in warning
