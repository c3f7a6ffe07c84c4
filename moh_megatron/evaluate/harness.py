"""lm-eval's tasks on a model. Its only importer.

An exported folder is judged by lm-eval's own class for Transformers, a checkpoint by ``CheckpointLM``.
"""

from __future__ import annotations

import difflib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moh_megatron.checkpoint.hf.transformers_io import open_tokenizer
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.evaluate.loaded_model import LoadedModel
from moh_megatron.evaluate.suite import Suite, Task
from moh_megatron.io.errors import UserError
from moh_megatron.model.generation import continue_text

_LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}
"""By what a metric divides a choice's log-likelihood; all others by nothing."""
_STRIDE = 16
"""Tokens that are generated between looks for a text to stop at."""


@dataclass(frozen=True)
class Question:
    """One question and how the model did."""

    task: str
    """Of a group the member."""
    id: int
    hash: str
    """Of the question."""
    answer: str
    """What the model chose, by its number, or wrote."""
    score: float
    """By the suite's metric."""


@dataclass(frozen=True)
class Score:
    """Of one task."""

    task: str
    shots: int
    metric: str
    value: float
    standard_error: float | None
    questions: int


def harness_version() -> str:
    return version("lm-eval")


def find_tasks(suite: Suite) -> TaskManager:
    """What lm-eval knows. Raises UserError for a task that it does not, for a metric that a task's settings do not
    name, and for data that are not installed."""
    manager = TaskManager()
    known = set(manager.all_tasks)
    for task in suite.tasks:
        if task.task not in known:
            near = difflib.get_close_matches(task.task, sorted(known), n=5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(f"{suite.name}: {task.task}: lm-eval {harness_version()} knows no such task{hint}.")
        suite.data_folder(task)
        columns = _columns({**(manager.task_index[task.task].cfg or {}), **task.settings})
        if columns and task.column not in columns:
            raise UserError(f"{suite.name}: {_no_metric(task, columns)}")
    return manager


def _columns(settings: Mapping[str, Any]) -> list[str]:
    """The metrics with their filters that a task or group is going to have; none where its settings do not tell."""
    of_group = settings.get("aggregate_metric_list")
    if of_group:
        of_group = [of_group] if isinstance(of_group, dict) else of_group
        asked = [(each["metric"], each.get("filter_list", "none")) for each in of_group]
        filters = [(metric, [names] if isinstance(names, str) else names) for metric, names in asked]
        return [f"{metric},{name}" for metric, names in filters for name in names]
    metrics = settings.get("metric_list") or []
    if "process_results" in settings or any(each.get("hf_evaluate") for each in metrics):
        return []  # these may give more than they are asked for
    names = [each["name"] for each in settings.get("filter_list") or [{"name": "none"}]]
    return [f"{str(each['metric']).rpartition('.')[2]},{name}" for each in metrics for name in names]


def _no_metric(task: Task, columns: Sequence[str]) -> str:
    return f"{task.task}: has no metric {task.metric}. It has {', '.join(columns)}."


def language_model(subject: LoadedModel, batch_size: int) -> LM:
    """``subject`` as lm-eval wants it."""
    if subject.kind == "folder":
        open_model: Any = HFLM  # its decorators hide its arguments from type checkers
        return open_model(
            pretrained=subject.model,
            tokenizer=open_tokenizer(subject.tokenizer_dir),
            batch_size=batch_size,
            device=str(subject.device),
            max_length=subject.context,
        )
    return CheckpointLM(subject, batch_size)


def run_task(
    model: LM, suite: Suite, task: Task, limit: int | None, manager: TaskManager
) -> tuple[Score, list[Question]]:
    """One task, ``limit`` questions of it (of each member of a group), all where None.

    Raises UserError where its data cannot be reached or it has no such metric.
    """
    loaded = _loaded(suite, task, manager)
    groups, members = loaded["groups"], loaded["tasks"]
    evaluate: Any = lm_eval.simple_evaluate
    results = evaluate(
        model=model,
        tasks=[groups[task.task]] if task.task in groups else [*members.values()],
        num_fewshot=task.shots,
        limit=limit,
        bootstrap_iters=0,
        task_manager=manager,
        log_samples=True,
    )
    of_task = (results.get("groups") or {}).get(task.task) or results["results"][task.task]
    if task.column not in of_task:
        raise UserError(_no_metric(task, _metrics(of_task)))
    questions = list(_questions(results["samples"], task, members))
    return _score(task, of_task[task.column], questions), questions


def _loaded(suite: Suite, task: Task, manager: TaskManager) -> Any:
    """The task with its data, of a group all of them."""
    try:
        with _specification(suite, task, manager) as specification:
            return manager.load([specification])
    except UserError:
        raise
    except Exception as error:  # datasets and the hub raise all kinds: for one task there is no reason to lose the rest
        hint = ""
        if "scripts are no longer supported" in str(error):
            hint = " Name a copy without one as settings: {dataset_path: COPY} in the suite."
        raise UserError(
            f"{task.task}: its evaluation set cannot be reached or read: {_first_line(error)}{hint}"
        ) from error


@contextmanager
def _specification(suite: Suite, task: Task, manager: TaskManager) -> Iterator[str]:
    """What lm-eval is asked for: the name, or a file that includes its own and lays the suite's settings over it."""
    folder = suite.data_folder(task)
    settings = {**task.settings, **(_data_settings(folder) if folder is not None else {})}
    if not settings:
        yield task.task
        return
    own = manager.task_index[task.task].yaml_path
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"{task.task}.yaml"
        file.write_text(json.dumps({"include": str(own), "task": task.task, **settings}), encoding="utf-8")
        yield str(file)


def _metrics(of_task: dict[str, Any]) -> list[str]:
    return sorted(name for name, value in of_task.items() if "," in name and "stderr" not in name and value is not None)


def _score(task: Task, value: float, questions: Sequence[Question]) -> Score:
    scores = [each.score for each in questions]
    error = None
    if len(scores) > 1:
        mean = math.fsum(scores) / len(scores)
        error = math.sqrt(math.fsum((each - mean) ** 2 for each in scores) / (len(scores) - 1) / len(scores))
    return Score(task.task, task.shots, task.metric, float(value), error, len(scores))


def _data_settings(folder: Path) -> dict[str, Any]:
    """What makes lm-eval read the splits that lie in ``folder``."""
    splits = {each.name: sorted(map(str, each.glob("*.arrow"))) for each in sorted(folder.iterdir()) if each.is_dir()}
    absent = {f"{name}_split": None for name in ("training", "validation", "test", "fewshot")}
    names = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    present = {names[split]: split for split in splits if split in names}
    return {
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
        **absent,
        **present,
    }


def _questions(
    samples: Mapping[str, list[dict[str, Any]]], task: Task, members: Mapping[str, Any]
) -> Iterator[Question]:
    metric, _, chosen_filter = task.column.partition(",")
    length = _LENGTHS.get(metric, lambda choice: 1)
    for member, questions in samples.items():
        for sample in questions:
            if sample.get("filter", "none") == chosen_filter and metric in sample:
                yield Question(
                    member,
                    sample["doc_id"],
                    sample["doc_hash"],
                    _answer(sample, members[member], length),
                    float(sample[metric]),
                )


def _answer(sample: Mapping[str, Any], task: Any, length: Callable[[str], int]) -> str:
    """The number of the choice with the greatest log-likelihood over its length, or what was written."""
    responses: list[Any] = sample["filtered_resps"]
    if not all(isinstance(each, list | tuple) and len(each) == 2 for each in responses):
        return str(responses[0])
    if len(responses) == 1:
        return str(responses[0][1])
    lengths = map(length, task.doc_to_choice(sample["doc"]))
    scores = [float(each[0]) / each_length for each, each_length in zip(responses, lengths, strict=True)]
    return str(scores.index(max(scores)))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class CheckpointLM(TemplateLM):
    """A checkpoint's model, which attends causally: rows of a batch are padded behind their end."""

    def __init__(self, subject: LoadedModel, batch_size: int) -> None:
        super().__init__()
        self._subject, self._batch_size = subject, batch_size
        self._tokenizer: Any = open_tokenizer(subject.tokenizer_dir)
        self._end = load_tokenizer(subject.tokenizer_dir).eos_token_id

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: as in lm-eval's class for Transformers."""
        begin = self._tokenizer.bos_token_id
        return self._end if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """As lm-eval's class for Transformers: with the special tokens the tokenizer adds by itself, unless the text
        begins with one."""
        if add_special_tokens is None and string.startswith(self._tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self._tokenizer.encode(string, **options)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **unused: Any) -> list[Any]:
        """For each (_, context, continuation): the continuation's log-probability, and whether it is the greedy one."""
        rows = [(context + continuation)[-(self._subject.context + 1) :] for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with tqdm(total=len(rows), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for start in range(0, len(order), self._batch_size):
                chunk = order[start : start + self._batch_size]
                width = len(rows[chunk[0]]) - 1
                tokens = torch.zeros(len(chunk), width, dtype=torch.int64)
                for place, index in enumerate(chunk):
                    tokens[place, : len(rows[index]) - 1] = torch.tensor(rows[index][:-1])
                logs = self._subject.logits(tokens).log_softmax(-1)
                for place, index in enumerate(chunk):
                    continuation = torch.tensor(requests[index][2], device=logs.device)
                    end = len(rows[index]) - 1
                    own = logs[place, end - len(continuation) : end]
                    likelihood = own.gather(-1, continuation[:, None]).sum()
                    found[index] = (float(likelihood), bool((own.argmax(-1) == continuation).all()))
                bar.update(len(chunk))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's context that do not overlap."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._subject.context,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(math.fsum(each for each, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy, one text after another and without a cache: for short answers."""
        return [self._generate(*request.args) for request in tqdm(requests, desc="generation", disable=disable_tqdm)]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 0.0) > 0:
            raise UserError(f"{self._subject.path}: a checkpoint generates greedily only; evaluate an exported folder.")
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        longest, room = int(options.get("max_gen_toks", 256)), self._subject.context
        if longest >= room:
            longest = max(1, room // 2)
        prompt = self.tok_encode(context)[-max(1, room - longest) :]
        tokens: list[int] = []
        while len(tokens) < longest:
            new = continue_text(
                self._subject.model,
                prompt + tokens,
                max_new_tokens=min(_STRIDE, longest - len(tokens)),
                temperature=0,
                top_k=None,
                stop_token=self.eot_token_id,
                context=self._subject.context,
                seed=0,
                device=self._subject.device,
            )
            tokens += new
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            if len(new) < _STRIDE or any(stop in text for stop in stops):
                break
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
