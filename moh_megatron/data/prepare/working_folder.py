"""The working folder of a dataset that is being made: the plan, what is finished of it, and the doing of the rest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.dataset_manifest import InputRecord, hash_file
from moh_megatron.data.prepare import encode, workers
from moh_megatron.data.prepare.indexed_writer import token_dtype
from moh_megatron.data.prepare.inputs import File, Input, most_documents, plan_parts
from moh_megatron.data.prepare.make_tokenizer import tokenizer_settings, train_on_inputs
from moh_megatron.data.prepare.merge import all_rejects, write_rejects
from moh_megatron.data.prepare.part import PartFiles
from moh_megatron.data.prepare.progress import Reporter, progress_bar
from moh_megatron.data.prepare.sample import TOLD
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.errors import UserError

logger = logging.getLogger(__name__)

REJECTS = "rejects.jsonl"
PART_FORMAT = 1
HASH = ".sha256"


class PrepareJob:
    """One plan: inputs, as they are now, and every setting that decides a part. Another plan has another folder.

    As a context it removes its folder on the way out when nothing in it is finished and nobody else is at work there.
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
        """What besides the inputs decides the dataset."""
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
        self._sign = self._begin()
        self.parts = [PartFiles(self.folder, number) for number in range(len(self.plan))]
        return self

    def _begin(self) -> Path:
        """Make the folder, and leave there a sign that somebody is at work: another shard may be on its way out."""
        for _ in range(9):
            with suppress(FileNotFoundError):
                return self._signed()
        return self._signed()

    def _signed(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".at-work-", dir=self.folder)
        os.close(descriptor)
        return Path(name)

    def __exit__(self, *_: object) -> None:
        self._sign.unlink(missing_ok=True)
        found = list(self._root.glob("*/*"))
        wanted = (
            path.suffix == ".json" or path.name == "tokenizer" or (path.name.startswith(".") and path.suffix != HASH)
            for path in found
        )
        if any(wanted):
            return
        # Not the folders with all that is in them: somebody may have begun since.
        with suppress(OSError):
            for path in (*found, self._root / REJECTS):
                path.unlink(missing_ok=True)
            for folder in (*self._root.glob("*"), self._root):
                folder.rmdir()

    def remove(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def tokenizer(self) -> Tokenizer:
        """The given one, or one made from the inputs, once."""
        if self._given is not None:
            return self._given
        folder = self.folder / "tokenizer"
        if not folder.exists():
            train_on_inputs(self.config, folder)
        return load_tokenizer(folder)

    def make_parts(self, tokenizer: Tokenizer, shard: int, shards: int) -> None:
        """Encode what is missing of the parts of this shard, the first being 1, and hash the files that begin in them.

        Raises UserError as soon as the rejects are too many whatever may follow.
        """
        data = self.config.data
        mine = list(range(len(self.plan)))[shard - 1 :: shards]
        missing = [number for number in mine if self.parts[number].summary() is None]
        if len(missing) < len(mine):
            logger.info(f"{self.folder}: {len(mine) - len(missing)} of {len(mine)} parts are finished already")
        with ThreadPoolExecutor(1) as hashing:
            hashed = hashing.submit(self._hash_files, mine)
            if missing:
                job = encode.Job(
                    inputs=tuple(self.inputs),
                    data=data,
                    tokenizer=tokenizer.file,
                    folder=self.folder,
                    dtype=token_dtype(tokenizer.vocab_size).__name__,
                    threads=data.workers or len(os.sched_getaffinity(0)),
                )
                with progress_bar("encode", self._bytes(missing)) as bar:
                    report = Reporter(bar, self._stops_early())
                    workers.encode(job, tokenizer, [(number, self.plan[number]) for number in missing], report)
            hashed.result()
        self._check_unchanged()

    def _stops_early(self) -> Callable[[encode.Progress], None]:
        """Raises where the rejects so far are too many even if all that is not finished now were documents."""
        data, limit, rejects, most = self.config.data, self.config.data.max_reject_fraction, 0, 0.0
        for part, segments in zip(self.parts, self.plan, strict=True):
            if (summary := part.summary()) is None:
                most += most_documents(self.inputs, segments, data)
            else:
                rejects, most = rejects + summary.rejects, most + summary.documents

        def check(done: encode.Progress) -> None:
            found = rejects + done.rejects
            if found > (limit and limit * (found + most)):
                self.check_rejects()

        return check

    def check_rejects(self) -> None:
        """Raise UserError, with the first rejects, where the finished parts have too many."""
        summaries = [summary for part in self.parts if (summary := part.summary()) is not None]
        rejects = sum(summary.rejects for summary in summaries)
        records = rejects + sum(summary.documents for summary in summaries)
        limit = self.config.data.max_reject_fraction
        if not records:
            raise UserError(f"data.inputs hold no text: {', '.join(each.name for each in self.inputs[:TOLD])}.")
        if rejects <= limit * records:
            return
        listed = self._root / REJECTS
        write_rejects(listed, self.rejects())
        quoted = [f"{each['file']}, line {each['line']}: {each['reason']}." for each in islice(self.rejects(), TOLD)]
        more = f"all {rejects:,} are in {listed}. " if rejects > TOLD else ""
        raise UserError(
            f"{rejects:,} of {records:,} records were rejected, more than data.max_reject_fraction ({limit:g}):\n"
            + "".join(f"{line}\n" for line in quoted)
            + f"{more}Mend the input, or raise data.max_reject_fraction and run the same command again."
        )

    def _check_unchanged(self) -> None:
        """Raise UserError, and drop the parts, where an input is no longer the file that was planned with."""
        for file in (file for each in self.inputs for file in each.files):
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
        return all_rejects(self.parts, self.plan, self.inputs)

    def same_inputs(self, recorded: Sequence[InputRecord]) -> bool:
        """Whether the inputs are those of a manifest; only a file that has been touched since is hashed."""
        files = [file for each in self.inputs for file in each.files]
        hubs = [each for each in self.inputs if each.kind == "hub"]
        known = [record for record in recorded if record.sha256 is not None]
        known_hubs = [record for record in recorded if record.sha256 is None]
        if len(hubs) != len(known_hubs) or len(files) != len(known):
            return False
        for record, hub in zip(known_hubs, hubs, strict=True):
            if record.path != hub.name or hub.revision not in (None, record.revision):
                return False
        return all(
            record.bytes == file.bytes
            and (
                (record.path, record.modified_ns) == (file.path, file.modified_ns)
                or record.sha256 == hash_file(Path(file.path))
            )
            for record, file in zip(known, files, strict=True)
        )

    def sha256(self, file: File) -> str:
        """Of an input file, as some shard found it."""
        path = self._hash_path(file)
        with suppress(FileNotFoundError):
            return path.read_text()
        digest = hash_file(Path(file.path))
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        temporary.write_text(digest)
        os.replace(temporary, path)
        return digest

    def _hash_path(self, file: File) -> Path:
        return self.folder / f"{hashlib.sha256(file.path.encode()).hexdigest()[:24]}{HASH}"

    def _hash_files(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            for segment in self.plan[number]:
                if segment.start == 0:
                    for file in self.inputs[segment.input].files:
                        self.sha256(file)

    def _bytes(self, numbers: Sequence[int] | range) -> int:
        return sum(segment.bytes for number in numbers for segment in self.plan[number])
