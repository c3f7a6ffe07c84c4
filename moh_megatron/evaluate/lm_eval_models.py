"""A trained model behind lm-eval's interface of models.

An exported folder runs in ``FolderLM``, lm-eval's own class for Transformers, a checkpoint in ``CheckpointLM``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moh_megatron.checkpoint.hf.transformers_io import open_tokenizer
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.evaluate.loaded_model import LoadedModel
from moh_megatron.io.console import progress_bar
from moh_megatron.io.errors import UserError
from moh_megatron.model.generation import generate_tokens

logger = logging.getLogger(__name__)

_STRIDE = 16
"""Tokens that are generated between two searches for a stop string."""


def language_model(loaded: LoadedModel, batch_size: int) -> LM:
    """``loaded`` behind lm-eval's interface of models."""
    if loaded.kind == "folder":
        return FolderLM(
            pretrained=loaded.model,
            tokenizer=open_tokenizer(loaded.tokenizer_dir, loaded.trust_remote_code),
            batch_size=batch_size,
            device=str(loaded.device),
            max_length=loaded.context,
        )
    return CheckpointLM(loaded, batch_size)


def _scored_in(context: int, requests: Sequence[Any]) -> list[Any]:
    """The ``requests``, (_, context, continuation) each, with no continuation that is longer than the model's context.

    Of a longer one the last tokens are kept: lm-eval truncates what stands before a continuation in the same way, from
    the left, but takes a continuation that does not fit for a mistake of the task.
    """
    if too_long := sum(len(continuation) > context for *_, continuation in requests):
        logger.warning(
            f"{too_long} of {len(requests)} continuations are longer than the model's context of {context} tokens: of "
            f"each, the last {context} tokens are scored."
        )
    return [
        (texts, [*before, *continuation[:-context]], continuation[-context:])
        for texts, before, continuation in requests
    ]


def _answer_length(context: int, options: Mapping[str, Any]) -> int:
    """The most tokens of a generated answer: what the task asks for or, if nothing would be left of the model's context
    for the question, half of the context."""
    asked = int(options.get("max_gen_toks", 256))
    return asked if asked < context else max(1, context // 2)


_HFLM: Any = HFLM  # Its decorators hide its methods and arguments from type checkers.


class FolderLM(_HFLM):
    """An exported folder's model in lm-eval's class for Transformers, with the limits of ``CheckpointLM``."""

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> list[Any]:
        return super()._loglikelihood_tokens(_scored_in(self.max_length, requests), *arguments, **options)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        fitting = []
        for request in requests:
            context, options = cast("tuple[str, dict[str, Any]]", request.args)
            options = {**options, "max_gen_toks": _answer_length(self.max_length, options)}
            fitting.append(replace(request, arguments=(context, options)))
        return super().generate_until(fitting, disable_tqdm)


class CheckpointLM(TemplateLM):
    """A checkpoint's model. Its attention is causal, so a batch is padded behind the end of each sequence."""

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        super().__init__()
        self._loaded, self._batch_size = loaded, batch_size
        self._tokenizer: Any = open_tokenizer(loaded.tokenizer_dir)
        self._eos_token_id = load_tokenizer(loaded.tokenizer_dir).eos_token_id

    @property
    def eot_token_id(self) -> int:
        return self._eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context, as in lm-eval's class for Transformers."""
        bos_token_id = self._tokenizer.bos_token_id
        return self._eos_token_id if bos_token_id is None else bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Encode as lm-eval's class for Transformers does: with the special tokens that the tokenizer adds by itself,
        unless the text begins with one."""
        if add_special_tokens is None and string.startswith(self._tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self._tokenizer.encode(string, **options)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **unused: Any) -> list[Any]:
        """For each (_, context, continuation): the continuation's log-probability, and whether it is the greedy one.

        What does not fit into the model's context is truncated as ``_scored_in`` says.
        """
        requests = _scored_in(self._loaded.context, requests)
        sequences = [(context + continuation)[-(self._loaded.context + 1) :] for _, context, continuation in requests]
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(sequences)
        with progress_bar("log-likelihoods", len(sequences), "request", hidden=disable_tqdm) as bar:
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                tokens = torch.zeros(len(batch), len(sequences[batch[0]]) - 1, dtype=torch.int64)
                for row, index in enumerate(batch):
                    tokens[row, : len(sequences[index]) - 1] = torch.tensor(sequences[index][:-1])
                log_probabilities = self._loaded.logits(tokens).log_softmax(-1)
                for row, index in enumerate(batch):
                    continuation = torch.tensor(requests[index][2], device=log_probabilities.device)
                    end = len(sequences[index]) - 1
                    predicted = log_probabilities[row, end - len(continuation) : end]
                    likelihood = predicted.gather(-1, continuation[:, None]).sum()
                    results[index] = (float(likelihood), bool((predicted.argmax(-1) == continuation).all()))
                bar.update(len(batch))
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of complete texts, in windows of the model's context that do not overlap."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._loaded.context,
                context_len=1,
            )
            requests_of_text = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(
                math.fsum(
                    likelihood for likelihood, _ in self._loglikelihood_tokens(requests_of_text, disable_tqdm=True)
                )
            )
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate greedily, one text after another and without a cache, which suits short answers."""
        texts = []
        with progress_bar("generation", len(requests), "request", hidden=disable_tqdm) as bar:
            for request in requests:
                texts.append(self._generate(*request.args))
                bar.update()
        return texts

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 0.0) > 0:
            raise UserError(f"{self._loaded.path}: a checkpoint generates greedily only; evaluate an exported folder.")
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        longest = _answer_length(self._loaded.context, options)
        prompt = self.tok_encode(context)[-max(1, self._loaded.context - longest) :]
        tokens: list[int] = []
        while len(tokens) < longest:
            new = generate_tokens(
                self._loaded.model,
                prompt + tokens,
                max_new_tokens=min(_STRIDE, longest - len(tokens)),
                temperature=0,
                top_k=None,
                stop_token=self.eot_token_id,
                context=self._loaded.context,
                seed=0,
                device=self._loaded.device,
            )
            tokens += new
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            if len(new) < _STRIDE or any(stop in text for stop in stops):
                break
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
