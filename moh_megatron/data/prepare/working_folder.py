"""Manages the working folder of a dataset that is being made: the plan, its finished parts, and making the others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.dataset_manifest import InputRecord, file_sha256
from moh_megatron.data.prepare import encode, workers
from moh_megatron.data.prepare.indexed_writer import token_dtype
from moh_megatron.data.prepare.inputs import File, Input, most_documents, plan_parts
from moh_megatron.data.prepare.make_tokenizer import tokenizer_settings, train_on_inputs
from moh_megatron.data.prepare.merge import all_rejects, write_rejects
from moh_megatron.data.prepare.part import PartFiles
from moh_megatron.data.prepare.read_documents import QUOTED_REJECTS
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.console import progress_bar
from moh_megatron.io.errors import UserError

logger = logging.getLogger(__name__)

REJECTS = "rejects.jsonl"
PART_FORMAT = 1
HASH_SUFFIX = ".sha256"


class PrepareJob:
    """The preparation of one plan: the inputs as they are now, and every setting that determines a part.

    Each plan has a folder of its own. On leaving the context the folder is removed if nothing in it is finished and no
    other process works there.
    """

    def __init__(self, config: Config, inputs: list[Input], given: Tokenizer | None) -> None:
        self.config, self.inputs, self._given = config, inputs, given
        data = config.data
        self._part_settings = {
            "tokenizer": tokenizer_settings(config, given),
            "text_key": data.text_key,
            "template": data.template,
            "text_unit": data.text_unit,
            "max_document_bytes": data.max_document_bytes,
            "max_record_bytes": data.max_record_bytes,
            "normalization": data.normalization,
            "drop_shorter": data.drop_shorter,
            "drop_longer": data.drop_longer,
        }
        self.settings: dict[str, Any] = {
            **self._part_settings,
            "deduplicate": data.deduplicate,
            "validation_fraction": data.validation_fraction,
            "ngram_baselines": data.ngram_baselines,
        }
        """What determines the dataset besides the inputs."""
        target = data_dir(config)
        self._root = target.with_name(f"{target.name}.parts")

    def __enter__(self) -> PrepareJob:
        self.plan = plan_parts(self.inputs, self.config.data.text_unit)
        plan = [
            PART_FORMAT,
            self._part_settings,
            list(map(asdict, self.inputs)),
            [list(map(asdict, part)) for part in self.plan],
        ]
        fingerprint = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
        self.folder = self._root / fingerprint
        self._marker = self._mark_as_in_use()
        self.parts = [PartFiles(self.folder, number) for number in range(len(self.plan))]
        return self

    def _mark_as_in_use(self) -> Path:
        """Create the folder with a marker that a process works there, even if another shard just removes it."""
        for _ in range(9):
            with suppress(FileNotFoundError):
                return self._create_marker()
        return self._create_marker()

    def _create_marker(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".at-work-", dir=self.folder)
        os.close(descriptor)
        return Path(name)

    def __exit__(self, *_: object) -> None:
        self._marker.unlink(missing_ok=True)
        paths = list(self._root.glob("*/*"))
        in_use = (
            path.suffix == ".json"
            or path.name == "tokenizer"
            or (path.name.startswith(".") and path.suffix != HASH_SUFFIX)
            for path in paths
        )
        if any(in_use):
            return
        # Remove these files only, not the folders with their content: another process may have started since.
        with suppress(OSError):
            for path in (*paths, self._root / REJECTS):
                path.unlink(missing_ok=True)
            for folder in (*self._root.glob("*"), self._root):
                folder.rmdir()

    def remove(self) -> None:
        """Remove the working folders of all plans of this dataset."""
        shutil.rmtree(self._root, ignore_errors=True)

    def tokenizer(self) -> Tokenizer:
        """The given tokenizer, or the one made from the inputs, which is made at the first call."""
        if self._given is not None:
            return self._given
        folder = self.folder / "tokenizer"
        if not folder.exists():
            train_on_inputs(self.config, folder)
        return load_tokenizer(folder)

    def make_parts(self, tokenizer: Tokenizer, shard: int, shards: int) -> None:
        """Encode the missing parts of ``shard`` (from 1) of ``shards``, and hash the files that begin in its parts.

        Raises UserError as soon as there are too many rejects whatever may follow.
        """
        data = self.config.data
        numbers = list(range(len(self.plan)))[shard - 1 :: shards]
        missing = [number for number in numbers if self.parts[number].summary() is None]
        if len(missing) < len(numbers):
            logger.info(f"{self.folder}: {len(numbers) - len(missing)} of {len(numbers)} parts are finished already")
        with ThreadPoolExecutor(1) as hashing:
            hashed = hashing.submit(self._hash_files, numbers)
            if missing:
                encode_job = encode.EncodeJob(
                    inputs=tuple(self.inputs),
                    data=data,
                    tokenizer=tokenizer.file,
                    folder=self.folder,
                    dtype=token_dtype(tokenizer.vocab_size).__name__,
                    threads=data.workers or len(os.sched_getaffinity(0)),
                )
                with progress_bar("encode", self._bytes(missing), "B", unit_scale=True) as bar:
                    report = _ProgressReporter(bar, self._early_reject_check())
                    workers.encode(encode_job, tokenizer, [(number, self.plan[number]) for number in missing], report)
            hashed.result()
        self._check_unchanged()

    def _early_reject_check(self) -> Callable[[encode.Progress], None]:
        """A check that raises if the rejects so far are too many even if all else that remains are documents."""
        data, limit, rejects, most_kept = self.config.data, self.config.data.max_reject_fraction, 0, 0.0
        for part, segments in zip(self.parts, self.plan, strict=True):
            if (summary := part.summary()) is None:
                most_kept += most_documents(self.inputs, segments, data)
            else:
                rejects, most_kept = rejects + summary.rejects, most_kept + summary.documents

        def check(done: encode.Progress) -> None:
            rejects_now = rejects + done.rejects
            if rejects_now > (limit and limit * (rejects_now + most_kept)):
                self.check_rejects()

        return check

    def check_rejects(self) -> None:
        """Raise UserError, which quotes the first rejects, if the finished parts have too many."""
        summaries = [summary for part in self.parts if (summary := part.summary()) is not None]
        rejects = sum(summary.rejects for summary in summaries)
        records = rejects + sum(summary.documents for summary in summaries)
        limit = self.config.data.max_reject_fraction
        if not records:
            raise UserError(
                f"data.inputs hold no text: {', '.join(source.name for source in self.inputs[:QUOTED_REJECTS])}."
            )
        if rejects <= limit * records:
            return
        listed = self._root / REJECTS
        write_rejects(listed, self.rejects())
        first_rejects = islice(self.rejects(), QUOTED_REJECTS)
        quoted = [f"{reject['file']}, line {reject['line']}: {reject['reason']}." for reject in first_rejects]
        more = f"all {rejects:,} are in {listed}. " if rejects > QUOTED_REJECTS else ""
        raise UserError(
            f"{rejects:,} of {records:,} records were rejected, more than data.max_reject_fraction ({limit:g}):\n"
            + "".join(f"{line}\n" for line in quoted)
            + f"{more}Mend the input, or raise data.max_reject_fraction and run the same command again."
        )

    def _check_unchanged(self) -> None:
        """Raise UserError, and remove the parts, if an input has changed since the plan was made."""
        for file in (file for source in self.inputs for file in source.files):
            try:
                status = os.stat(file.path)
            except OSError as error:
                raise UserError(
                    f"{file.path}: cannot be read any more ({error.strerror}). Bring the file back and run the same "
                    "command again."
                ) from None
            if (status.st_size, status.st_mtime_ns) != (file.bytes, file.modified_ns):
                shutil.rmtree(self.folder, ignore_errors=True)
                raise UserError(
                    f"{file.path}: changed while it was read: {file.bytes:,} bytes when the run began, "
                    f"{status.st_size:,} now. Run the same command again when nothing writes to the file any more."
                )

    def rejects(self) -> Iterator[dict[str, Any]]:
        """Every reject of the finished parts, as ``all_rejects`` gives them."""
        return all_rejects(self.parts, self.plan, self.inputs)

    def same_inputs(self, recorded: Sequence[InputRecord]) -> bool:
        """Whether the inputs are those of a manifest; only a file that was modified since is hashed."""
        files = [file for source in self.inputs for file in source.files]
        hubs = [source for source in self.inputs if source.kind == "hub"]
        recorded_files = [record for record in recorded if record.sha256 is not None]
        recorded_hubs = [record for record in recorded if record.sha256 is None]
        if len(hubs) != len(recorded_hubs) or len(files) != len(recorded_files):
            return False
        for record, hub in zip(recorded_hubs, hubs, strict=True):
            if record.path != hub.name or hub.revision not in (None, record.revision):
                return False
        return all(
            record.bytes == file.bytes
            and (
                (record.path, record.modified_ns) == (file.path, file.modified_ns)
                or record.sha256 == file_sha256(Path(file.path))
            )
            for record, file in zip(recorded_files, files, strict=True)
        )

    def sha256(self, file: File) -> str:
        """The sha256 of an input file, which one shard computes for all."""
        path = self._hash_path(file)
        with suppress(FileNotFoundError):
            return path.read_text()
        digest = file_sha256(Path(file.path))
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        temporary.write_text(digest)
        os.replace(temporary, path)
        return digest

    def _hash_path(self, file: File) -> Path:
        return self.folder / f"{hashlib.sha256(file.path.encode()).hexdigest()[:24]}{HASH_SUFFIX}"

    def _hash_files(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            for segment in self.plan[number]:
                if segment.start == 0:
                    for file in self.inputs[segment.input].files:
                        self.sha256(file)

    def _bytes(self, numbers: Sequence[int] | range) -> int:
        return sum(segment.bytes for number in numbers for segment in self.plan[number])


class _ProgressReporter:
    """Shows on ``bar``, a ``progress_bar``, how many bytes on disk were read and what they gave.

    ``check`` is called with the total whenever a part is finished and there are rejects.
    """

    def __init__(self, bar: Any, check: Callable[[encode.Progress], None]) -> None:
        self._bar, self._check = bar, check
        self._done = encode.Progress()
        self._started = time.monotonic()

    def __call__(self, new: encode.Progress) -> None:
        done = self._done = encode.Progress(*map(sum, zip(self._done, new, strict=True)))
        rate = done.text / 1e6 / max(time.monotonic() - self._started, 1e-6)
        rejects = f", {done.rejects:,} rejects" if done.rejects else ""
        self._bar.set_postfix_str(
            f"{rate:.1f} MB/s of text, {done.documents:,} documents, {done.tokens:,} tokens{rejects}", refresh=False
        )
        self._bar.update(new.read)
        if new.parts and done.rejects:
            self._check(done)
