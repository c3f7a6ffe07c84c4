"""Event files, read back as TensorBoard reads them."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moh_megatron.monitor.accumulator import StepMetrics
from moh_megatron.monitor.board import Board


def metrics(step, lm_loss):
    return StepMetrics(
        step=step, tokens=64 * step, lm_loss=lm_loss, balance_loss=1.5, grad_norm=0.25, lr=0.125, tokens_per_second=32.0
    )


def live(folder, start, end, lm_loss):
    board = Board(folder, start)
    for step in range(start + 1, end + 1):
        board.step(metrics(step, lm_loss), lm_loss + 1)
    board.close()
    # TensorBoard reads files in the order of their names, which hold the second and, within one process, a count.
    lives = list(folder.glob("events.out.tfevents.life*"))
    (written,) = set(folder.glob("events.out.tfevents.*")) - set(lives)
    written.rename(folder / f"events.out.tfevents.life{len(lives)}")


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def values(accumulator, tag):
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_scalars_of_a_step(tmp_path):
    live(tmp_path, 0, 2, 4.0)
    read = events(tmp_path)
    expected = {
        "loss/total": 5.0,
        "loss/lm": 4.0,
        "loss/balance": 1.5,
        "optimizer/grad_norm": 0.25,
        "optimizer/lr": 0.125,
        "throughput/tokens_per_second": 32.0,
    }
    for tag, value in expected.items():
        assert values(read, tag) == [(1, value), (2, value)]
    assert values(read, "throughput/tokens") == [(1, 64.0), (2, 128.0)]
    assert sorted(read.Tags()["scalars"]) == sorted([*expected, "throughput/tokens"])


def test_head_load_has_a_scalar_a_head(tmp_path):
    board = Board(tmp_path, 0)
    board.head_load(torch.tensor([[1.0, 0.25], [0.5, 0.75]]), 10)
    board.close()
    read = events(tmp_path)
    loads = [[values(read, f"head_load/layer_0{layer}/head_0{head}") for head in range(2)] for layer in range(2)]
    assert loads == [[[(10, 1.0)], [(10, 0.25)]], [[(10, 0.5)], [(10, 0.75)]]]


def test_validation_shows_its_loss_and_the_text_at_once(tmp_path):
    board = Board(tmp_path, 0)
    board.validation(3.5, "It is a truth — universally", 20)
    read = events(tmp_path)
    assert values(read, "loss/validation") == [(20, 3.5)]
    (text,) = read.Tensors("sample/text_summary")
    assert text.step == 20
    assert text.tensor_proto.string_val[0].decode() == "It is a truth — universally"
    board.close()


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_resumed_run_shows_one_value_a_step(tmp_path, start):
    live(tmp_path, 0, 5, 4.0)
    live(tmp_path, start, 7, 2.0)
    expected = [(step, 4.0 if step <= start else 2.0) for step in range(1, 8)]
    assert values(events(tmp_path), "loss/lm") == expected


def test_a_run_resumed_twice(tmp_path):
    live(tmp_path, 0, 5, 4.0)
    live(tmp_path, 4, 6, 2.0)
    live(tmp_path, 2, 6, 1.0)
    assert values(events(tmp_path), "loss/lm") == [(1, 4.0), (2, 4.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 1.0)]
