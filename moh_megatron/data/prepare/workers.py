"""Encodes parts in as few processes as keep the cores busy; none of them imports torch or Megatron-core."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from moh_megatron.data.prepare.encode import EncodeJob, Report, encode_parts
from moh_megatron.data.prepare.inputs import Part
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.errors import Fault

CORES_A_PROCESS = 16
"""How many cores one process keeps busy, of which one runs the Python that reads, hashes and writes."""
NumberedPart = tuple[int, Part]


def encode(job: EncodeJob, tokenizer: Tokenizer, parts: Sequence[NumberedPart], report: Report) -> None:
    """Do ``encode_parts`` on ``job.threads`` cores, in this process if it can keep them busy, else in several.

    ``tokenizer`` is the one that ``job`` names. Raises what ``encode_parts`` does, and Fault if a process is killed.
    """
    processes = min(-(-job.threads // CORES_A_PROCESS), len(parts))
    job = replace(job, threads=-(-job.threads // max(processes, 1)))
    # The tokenizers library reads these when a process first encodes.
    os.environ["RAYON_NUM_THREADS"] = str(job.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if processes <= 1:
        encode_parts(job, tokenizer, parts, report)
        return
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    children = [
        context.Process(target=_encode_in_child, args=(job, parts[first::processes], messages), daemon=True)
        for first in range(processes)
    ]
    try:
        for process in children:
            process.start()
        running = processes
        while running:
            try:
                message = messages.get(timeout=0.2)
            except queue.Empty:
                if any(process.exitcode for process in children):
                    raise Fault(
                        "An encoder process was killed, perhaps for want of memory. Lower data.workers or "
                        "data.max_document_bytes and run the same command again; finished parts are kept."
                    ) from None
                continue
            if isinstance(message, BaseException):
                raise message
            if message is None:
                running -= 1
            else:
                report(message)
    finally:
        for process in children:
            process.terminate()
            process.join()


def _encode_in_child(job: EncodeJob, parts: Sequence[NumberedPart], messages: Any) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        encode_parts(job, load_tokenizer(job.tokenizer), parts, messages.put)
        messages.put(None)
    except BaseException as error:  # raised again by the parent
        messages.put(error)


def _exit_with_parent() -> None:
    """End this process as soon as its parent has ended, however that happened."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
