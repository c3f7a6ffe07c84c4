"""Running lm-eval's tasks: unknown tasks and metrics, likelihoods of a checkpoint, progress bars."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import lm_eval.api.task
import pytest
import torch
from lm_eval.api.instance import Instance

from moh_megatron.evaluate import harness, lm_eval_models
from moh_megatron.evaluate.loaded_model import load_model
from moh_megatron.evaluate.suite import Suite, Task
from moh_megatron.io.errors import UserError

SUITE = Suite("s", "d", (Task("a", 0, "acc"),))


class Manager:
    """A stand-in for lm-eval's TaskManager that knows a few tasks and loads them by ``load``."""

    def __init__(self, load: Any = None) -> None:
        settings: dict[str, Any] = {
            "arc_easy": {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
            "gsm8k": {"metric_list": [{"metric": "exact_match"}], "filter_list": [{"name": "strict-match"}]},
            "mmlu": {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]},
            "culture": {"aggregate_metric_list": {"metric": "acc", "filter_list": ["none"]}},
            "custom": {"metric_list": [{"metric": "acc"}], "process_results": "utils.more"},
            "made_in_python": None,
        }
        self.all_tasks = [*settings]
        self.task_index = {name: SimpleNamespace(cfg=cfg) for name, cfg in settings.items()}
        self.load = load


def test_an_unknown_task_is_refused_with_similar_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "TaskManager", Manager)
    with pytest.raises(UserError, match=r"s: arc_eazy: lm-eval [\d.]+ knows no such task; near it: arc_easy"):
        harness.find_tasks(Suite("s", "d", (Task("arc_eazy", 0, "acc"),)))
    assert isinstance(harness.find_tasks(Suite("s", "d", (Task("arc_easy", 0, "acc"),))), Manager)


@pytest.mark.parametrize(
    ("task", "metric", "own"),
    [
        ("arc_easy", "accc", "acc,none, acc_norm,none"),
        ("gsm8k", "exact_match", "exact_match,strict-match"),
        ("mmlu", "acc_norm", "acc,none"),
    ],
)
def test_a_metric_that_the_task_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, task: str, metric: str, own: str
) -> None:
    monkeypatch.setattr(harness, "TaskManager", Manager)
    with pytest.raises(UserError, match=rf"^s: {task}: has no metric {metric}\. It has {own}\.$"):
        harness.find_tasks(Suite("s", "d", (Task(task, 0, metric),)))


def test_a_metric_is_accepted_where_the_task_has_it_or_its_settings_do_not_name_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "TaskManager", Manager)
    good = [("arc_easy", "acc_norm"), ("gsm8k", "exact_match,strict-match"), ("mmlu", "acc"), ("culture", "acc")]
    unknown = [("custom", "more"), ("made_in_python", "acc")]
    tasks = [Task(name, 0, metric) for name, metric in [*good, *unknown]]
    tasks.append(Task("arc_easy", 0, "f1", settings={"metric_list": [{"metric": "f1"}]}))
    harness.find_tasks(Suite("s", "d", tuple(tasks)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("no route\nto host"), "a: its evaluation set cannot be reached or read: no route$"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found a.py"),
            r"Name a copy without one as settings",
        ),
        (UserError("a: its data are in the package x"), "^a: its data are in the package x$"),
    ],
)
def test_unreachable_data_are_a_user_error_of_the_task(error: Exception, expected: str) -> None:
    def load(specification: Any) -> None:
        raise error

    manager: Any = Manager(load)
    with pytest.raises(UserError, match=expected):
        harness.run_task(None, SUITE, SUITE.tasks[0], None, manager)  # pyright: ignore[reportArgumentType]


def test_the_reported_answer_is_the_choice_that_the_metric_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    member = SimpleNamespace(doc_to_choice=lambda doc: ["yes", "certainly not"])
    manager: Any = Manager(lambda specification: {"groups": {}, "tasks": {"a": member}})

    def answer_by(metric: str, sample: dict[str, Any]) -> str:
        results = {"results": {"a": {f"{metric},none": sample[metric]}}, "samples": {"a": [sample]}}
        monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **unused: results)
        task = Task("a", 0, metric)
        score, (question,) = harness.run_task(None, SUITE, task, None, manager)  # pyright: ignore[reportArgumentType]
        assert (score.value, question.score) == (sample[metric], sample[metric])
        return question.answer

    sample = {"doc": {}, "filtered_resps": [(-3.0, False), (-6.0, False)], "doc_id": 0, "doc_hash": "h"}
    sample |= {"filter": "none", "acc": 1.0, "acc_norm": 0.0}
    assert answer_by("acc", sample) == "0"
    assert answer_by("acc_norm", sample) == "1"
    assert answer_by("acc", {**sample, "filtered_resps": ["42"]}) == "42"


class Letters:
    """A tokenizer with one token for each letter, which adds BOS by default."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return begin + [ord(letter) - ord("a") for letter in text]

    def decode(self, tokens: Any, **unused: Any) -> str:
        return "".join(chr(ord("a") + token) for token in ([tokens] if isinstance(tokens, int) else tokens))


def checkpoint_lm(monkeypatch: pytest.MonkeyPatch, bos: int | None, context: int = 8) -> Any:
    monkeypatch.setattr(lm_eval_models, "open_tokenizer", lambda folder: Letters(bos))
    monkeypatch.setattr(lm_eval_models, "load_tokenizer", lambda folder: SimpleNamespace(eos_token_id=25))
    table = torch.randn(26, 26, generator=torch.Generator().manual_seed(0))
    loaded: Any = SimpleNamespace(
        path=Path("checkpoint"),
        tokenizer_dir=Path("t"),
        context=context,
        model=None,
        device=torch.device("cpu"),
        logits=lambda tokens: table[tokens],
    )
    return lm_eval_models.CheckpointLM(loaded, 2), table.log_softmax(-1)


@pytest.mark.parametrize(("bos", "prefix"), [(None, 25), (24, 24)])
def test_likelihoods_of_a_checkpoint_are_those_of_its_logits(
    monkeypatch: pytest.MonkeyPatch, bos: int | None, prefix: int
) -> None:
    model, table = checkpoint_lm(monkeypatch, bos)
    assert (model.prefix_token_id, model.eot_token_id) == (prefix, 25)
    requests = [SimpleNamespace(args=args) for args in (("ab", "c"), ("", "de"), ("a" * 20, "fg"))]
    first, second, third = model.loglikelihood(requests, disable_tqdm=True)
    assert first[0] == pytest.approx(float(table[1, 2]), rel=1e-6)
    assert second[0] == pytest.approx(float(table[prefix, 3] + table[3, 4]), rel=1e-6)
    assert third[0] == pytest.approx(float(table[0, 5] + table[5, 6]), rel=1e-6)
    assert first[1] == (int(table[1].argmax()) == 2)
    (total,) = model.loglikelihood_rolling([SimpleNamespace(args=("abc",))], disable_tqdm=True)
    begun = [prefix, *model.tok_encode("abc")]
    assert total == pytest.approx(sum(float(table[a, b]) for a, b in pairwise(begun)), rel=1e-6)


@pytest.mark.parametrize("continuation", ["bcdefghi", "abcdefghi", "xyz" * 9])
def test_of_a_continuation_longer_than_the_context_the_last_tokens_are_scored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, continuation: str
) -> None:
    model, table = checkpoint_lm(monkeypatch, None)
    requests = [SimpleNamespace(args=args) for args in (("a", continuation), ("ab", "c"))]
    long, short = model.loglikelihood(requests, disable_tqdm=True)
    tokens = model.tok_encode("a" + continuation)[-9:]
    assert long[0] == pytest.approx(sum(float(table[a, b]) for a, b in pairwise(tokens)), rel=1e-5)
    assert short[0] == pytest.approx(float(table[1, 2]), rel=1e-6)
    said = "1 of 2 continuations are longer than the model's context of 8 tokens: of each, the last 8 tokens are scored"
    assert (said in caplog.text) == (len(continuation) > 8)


def test_an_export_scores_and_generates_like_its_checkpoint_beyond_the_context(
    checkpoint: Path, exported: Path, letters: str
) -> None:
    models = []
    for folder in (checkpoint, exported):
        loaded = replace(load_model(folder, torch.device("cpu")), context=16)
        models.append(lm_eval_models.language_model(loaded, 2))
    texts = [("the quick", letters), ("the quick", letters + letters), (letters, "brown fox")]
    requests: Any = [Instance("loglikelihood", {}, text, index) for index, text in enumerate(texts)]
    of_checkpoint, of_export = (model.loglikelihood(requests) for model in models)
    assert [value for value, _ in of_export] == pytest.approx([value for value, _ in of_checkpoint], rel=1e-4)
    assert [greedy for _, greedy in of_export] == [greedy for _, greedy in of_checkpoint]
    options = {"until": ["\n"], "max_gen_toks": 256, "do_sample": False}
    asked: Any = [Instance("generate_until", {}, (letters, options), 0)]
    (first,), (second,) = (model.generate_until(asked) for model in models)
    assert first.strip() == second.strip() != ""


def test_bos_is_not_added_to_a_text_that_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = checkpoint_lm(monkeypatch, 24)
    assert model.tok_encode("ab") == [24, 0, 1]
    assert model.tok_encode("yab") == [24, 0, 1]
    assert model.tok_encode("ab", add_special_tokens=False) == [0, 1]


def generate(model: Any, context: str, options: dict[str, Any]) -> str:
    (text,) = model.generate_until([SimpleNamespace(args=(context, options))], disable_tqdm=True)
    return text


@pytest.mark.parametrize(("context", "prompt", "longest"), [(8, 4, 4), (300, 20, 256), (260, 4, 256), (1, 1, 1)])
def test_prompt_and_answer_fit_into_the_context(
    monkeypatch: pytest.MonkeyPatch, context: int, prompt: int, longest: int
) -> None:
    model, _ = checkpoint_lm(monkeypatch, None, context)
    lengths: list[tuple[int, int]] = []

    def generate_tokens(model: Any, tokens: list[int], max_new_tokens: int, **unused: Any) -> list[int]:
        lengths.append((len(tokens), max_new_tokens))
        return [1] * max_new_tokens

    monkeypatch.setattr(lm_eval_models, "generate_tokens", generate_tokens)
    assert generate(model, "a" * 20, {}) == "b" * longest
    assert lengths[0][0] == prompt
    with pytest.raises(UserError, match="generates greedily only"):
        generate(model, "a", {"do_sample": True, "temperature": 0.7})


@pytest.mark.parametrize(("quiet", "bars"), [(False, 1), (True, 0)])
def test_lm_evals_progress_bars_are_hidden_under_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool, bars: int
) -> None:
    monkeypatch.setattr(harness, "is_quiet", lambda: quiet)

    def evaluate(**unused: Any) -> None:
        list(lm_eval.api.task.tqdm([1, 2], disable=False))
        raise KeyboardInterrupt

    before = lm_eval.api.task.tqdm
    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    manager: Any = Manager(lambda specification: {"groups": {}, "tasks": {"a": None}})
    with pytest.raises(KeyboardInterrupt):
        harness.run_task(None, SUITE, SUITE.tasks[0], None, manager)  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().err.count("2/2") == bars
    assert lm_eval.api.task.tqdm is before
