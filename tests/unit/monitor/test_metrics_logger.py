"""Event files, read as TensorBoard reads them."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.monitor.accumulator import StepMetrics
from moh_megatron.monitor.flops import Flops, FlopsPerToken
from moh_megatron.monitor.head_figures import head_figures
from moh_megatron.monitor.metrics_logger import IntervalStats, MetricsLogger
from moh_megatron.monitor.tensorboard import TensorBoard


def metrics(step, lm_loss):
    return StepMetrics(
        step=step, tokens=64 * step, lm_loss=lm_loss, balance_loss=1.5, grad_norm=0.25, lr=0.125, tokens_per_second=32.0
    )


def new_logger(folder, start=0, **options):
    return MetricsLogger(TensorBoard(folder, start), **options)


def train(folder, start, end, lm_loss):
    """Write the steps of a run between two restarts: start + 1 to end."""
    metrics_logger = new_logger(folder, start)
    for step in range(start + 1, end + 1):
        metrics_logger.step(metrics(step, lm_loss), lm_loss + 1)
    metrics_logger.close()
    # TensorBoard reads files in the order of their names, which hold the second and, within one process, a count.
    earlier = list(folder.glob("events.out.tfevents.part*"))
    (written,) = set(folder.glob("events.out.tfevents.*")) - set(earlier)
    written.rename(folder / f"events.out.tfevents.part{len(earlier)}")


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def values(accumulator, tag):
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def text_of(accumulator, tag):
    return accumulator.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_scalars_of_a_step(tmp_path):
    train(tmp_path, 0, 2, 4.0)
    read = events(tmp_path)
    expected = {
        "loss/total": 5.0,
        "loss/lm": 4.0,
        "loss/perplexity": pytest.approx(math.exp(4.0)),
        "loss/balance": 1.5,
        "optimizer/grad_norm": 0.25,
        "optimizer/lr": 0.125,
        "throughput/tokens_per_second": 32.0,
    }
    for tag, value in expected.items():
        assert values(read, tag) == [(1, value), (2, value)]
    assert values(read, "throughput/tokens") == [(1, 64.0), (2, 128.0)]
    assert sorted(read.Tags()["scalars"]) == sorted([*expected, "throughput/tokens"])


def test_figures_of_an_interval(tmp_path):
    flops = FlopsPerToken(Flops(4e9, 0.0), Flops(3e9, 0.0), Flops(5e9, 0.0))
    metrics_logger = new_logger(tmp_path, devices=2, peak_tflops=100.0)
    stats = IntervalStats(
        seconds={"forward": 0.25, "step": 0.5},
        memory=[2**30, 2**31],
        busy=[0.2, 0.1, 0.1],
        parameter_norm=7.0,
        router_grad_norm=0.5,
        bad_steps=3,
        restarts=1,
        flops=flops,
    )
    metrics_logger.interval(tokens_per_second=2000.0, stats=stats, step=10)
    metrics_logger.close()
    read = events(tmp_path)
    found = {tag: values(read, tag)[0][1] for tag in read.Tags()["scalars"]}
    assert found == pytest.approx(
        {
            "time/forward": 0.25,
            "time/step": 0.5,
            "time/slowest_rank_over_median": 2.0,
            "memory/largest_rank_gib": 2.0,
            "optimizer/parameter_norm": 7.0,
            "optimizer/router_grad_norm": 0.5,
            "run/bad_steps": 3,
            "run/restarts": 1,
            "throughput/tflops_dense_equivalent": 4.0,
            "throughput/tflops_active_heads": 3.0,
            "throughput/tflops_executed": 5.0,
            "throughput/mfu_dense_equivalent": 0.04,
            "throughput/mfu_active_heads": 0.03,
            "throughput/mfu_executed": 0.05,
        }
    )


def test_head_load_has_a_scalar_per_head(tmp_path):
    metrics_logger = new_logger(tmp_path)
    metrics_logger.head_load(torch.tensor([[1.0, 0.25], [0.5, 0.75]]), 10)
    metrics_logger.close()
    read = events(tmp_path)
    loads = [[values(read, f"head_load/layer_0{layer}/head_0{head}") for head in range(2)] for layer in range(2)]
    assert loads == [[[(10, 1.0)], [(10, 0.25)]], [[(10, 0.5)], [(10, 0.75)]]]


def test_single_heads_have_scalars_only_where_they_are_wanted(tmp_path):
    figures = head_figures(torch.tensor([[1.0, 0.5, 0.5]]), [LayerHeads(3, (0,), 2)], [1], [(0, 1, 2)])
    tags = {}
    for wanted in (False, True):
        metrics_logger = new_logger(tmp_path / str(wanted), head_scalars=wanted)
        metrics_logger.heads(figures, {}, 1)
        metrics_logger.close()
        shown = events(tmp_path / str(wanted)).Tags()["scalars"]
        tags[wanted] = [tag for tag in shown if tag.startswith("head_load/")]
    assert tags == {False: [], True: [f"head_load/layer_00/head_0{head}" for head in range(3)]}


def test_loss_throughput_and_routing_come_first_and_in_this_order(tmp_path):
    new_logger(tmp_path).close()
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])  # pyright: ignore[reportAttributeAccessIssue]
    assert [category.title for category in layout.category] == ["loss", "throughput", "routing", "optimizer"]
    assert list(layout.category[0].chart[0].multiline.tag) == ["^loss/lm$", "^loss/total$"]


def test_figures_of_heads_and_routers(tmp_path):
    layers = [LayerHeads(4, (0,), 2), LayerHeads(4, (0, 1, 2, 3), 4)]
    load = torch.tensor([[1.0, 0.5, 0.49, 0.01], [1.0, 1.0, 1.0, 1.0]])
    figures = head_figures(load, layers, [1, 0], [(0, 1), (2, 3)])
    observed = {"z_loss": [2.0, math.nan], "entropy": [0.75, math.nan], "alpha_shared": [1.25, math.nan]}
    metrics_logger = new_logger(tmp_path)
    metrics_logger.heads(figures, observed, 5)
    metrics_logger.head_maps(figures, 5)
    metrics_logger.close()
    read = events(tmp_path)
    found = {tag: values(read, tag)[0][1] for tag in read.Tags()["scalars"]}
    shares = np.array([0.5, 0.49, 0.01])
    assert found == pytest.approx(
        {
            "routing_dead_heads/layer_00": 1 / 3,
            "routing_load_entropy/layer_00": -(shares * np.log(shares)).sum() / math.log(3),
            "routing_rank_imbalance/layer_00": 1.5,
            "routing_rank_imbalance/layer_01": 1.0,
            "routing_z_loss/layer_00": 2.0,
            "routing_entropy/layer_00": 0.75,
            "routing_alpha_shared/layer_00": 1.25,
            "loss/z": 2.0,
        }
    )
    picture = np.asarray(Image.open(io.BytesIO(read.Images("routing_load/layers_by_heads")[0].encoded_image_string)))
    assert picture.shape == (24, 48, 3)
    assert [int(picture[6, 12 * head + 6, 0]) for head in range(4)] == [0, 128, 130, 252]
    (spread,) = read.Histograms("routing_load/over_fair_load")
    assert spread.histogram_value.num == 3
    assert spread.histogram_value.sum == pytest.approx(3.0)


def test_validation_shows_its_losses_and_its_sample_immediately(tmp_path):
    metrics_logger = new_logger(tmp_path)
    metrics_logger.validation(3.5, "It is a truth — universally", 20, {"books": 3.0, "web": 4.0})
    read = events(tmp_path)
    assert values(read, "loss/validation") == [(20, 3.5)]
    assert values(read, "loss/validation_perplexity") == [(20, pytest.approx(math.exp(3.5)))]
    assert [values(read, f"validation/{name}") for name in ("books", "web")] == [[(20, 3.0)], [(20, 4.0)]]
    (text,) = read.Tensors("sample/text_summary")
    assert text.step == 20
    assert text.tensor_proto.string_val[0].decode() == "It is a truth — universally"
    metrics_logger.close()


def test_texts_alarms_and_hyperparameters(tmp_path):
    metrics_logger = new_logger(tmp_path)
    metrics_logger.describe({"config": "run: {}", "version": "git abc"}, 0)
    metrics_logger.alarm(["dead heads: layer 1 head 2"], 3)
    metrics_logger.finish({"moh.active_heads": 4, "moh.enabled": True, "moh.router": "learned"}, {"summary/loss": 2.5})
    metrics_logger.close()
    read = events(tmp_path)
    assert [text_of(read, tag) for tag in ("config", "version")] == ["run: {}", "git abc"]
    assert text_of(read, "alarms") == "dead heads: layer 1 head 2"
    assert values(read, "summary/loss") == [(0, 2.5)]
    assert read.PluginTagToContent("hparams").keys() == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    assert len(list(tmp_path.iterdir())) == 1, "another folder would be another run"


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_resumed_run_shows_one_value_per_step(tmp_path, start):
    train(tmp_path, 0, 5, 4.0)
    train(tmp_path, start, 7, 2.0)
    expected = [(step, 4.0 if step <= start else 2.0) for step in range(1, 8)]
    assert values(events(tmp_path), "loss/lm") == expected


def test_a_run_resumed_twice_shows_one_value_per_step(tmp_path):
    train(tmp_path, 0, 5, 4.0)
    train(tmp_path, 4, 6, 2.0)
    train(tmp_path, 2, 6, 1.0)
    assert values(events(tmp_path), "loss/lm") == [(1, 4.0), (2, 4.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 1.0)]


def test_a_truncated_file_of_a_killed_run_does_not_hide_later_steps(tmp_path):
    train(tmp_path, 0, 5, 4.0)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    train(tmp_path, 4, 6, 2.0)
    assert values(events(tmp_path), "loss/lm") == [(1, 4.0), (2, 4.0), (3, 4.0), (4, 4.0), (5, 2.0), (6, 2.0)]


def test_final_results_are_shown_at_the_last_step(tmp_path):
    metrics_logger = new_logger(tmp_path, start=10)
    metrics_logger.step(metrics(12, 4.0), 5.0)
    metrics_logger.evaluation({"piqa": 0.5}, 11)
    metrics_logger.finish({"run.seed": 1}, {"summary/train_loss": 4.0})
    metrics_logger.close()
    assert values(events(tmp_path), "summary/train_loss") == [(12, 4.0)]
