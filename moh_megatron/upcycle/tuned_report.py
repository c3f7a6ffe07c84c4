"""Reports what tuning recovered: losses of held-out documents before and after it, beside a tuned dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from moh_megatron.checkpoint import layout
from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.config.load import load_config
from moh_megatron.config.paths import data_dir, require_folder
from moh_megatron.data.prepared_data import load_prepared
from moh_megatron.io.errors import UserError, refuse_differences
from moh_megatron.io.json_file import read_json, write_json
from moh_megatron.model.single import build_single_process
from moh_megatron.monitor.records import read_records
from moh_megatron.parallel import groups
from moh_megatron.upcycle.held_out import held_out_documents
from moh_megatron.upcycle.loss_and_kl import document_losses, mean, recovered_share


class TunedRun:
    """A finished run of continue-tuning in its folder, measured on at most ``max_documents`` documents.

    Raises:
        UserError: the folder holds no such run.
    """

    def __init__(self, folder: Path, max_documents: int | None = None) -> None:
        self.folder, self.max_documents = folder, max_documents
        require_folder(folder, "the folder of a run")
        if not (folder / layout.CONFIG).is_file():
            raise UserError(f"{folder}: must be the folder of a run. Got one without {layout.CONFIG}.")
        self.config = load_config(folder / layout.CONFIG)
        if self.config.train.init_from is None:
            raise UserError(f"{folder}: must be a run of moh-tune. Got train.init_from: null.")
        self._file = folder / "documents.json"

    @cached_property
    def before(self) -> list[float]:
        """Losses of the model before tuning, by document."""
        assert self.config.train.init_from is not None, "written by moh-tune"
        return self._losses(layout.resolve_checkpoint(self.config.train.init_from))

    @cached_property
    def after(self) -> list[float]:
        """Losses of the newest checkpoint, by document."""
        return self._losses(self._newest)

    @property
    def tokens(self) -> int:
        """The number of tokens that the newest checkpoint was trained on."""
        return layout.read_state(self._newest).tokens

    @property
    def heads(self) -> str:
        """The numbers of active, all and shared heads in the first layer: "6 of 8, 2 shared", "..., in 2 KV groups"."""
        first = layer_heads(self.config.model, self.config.moh)[0]
        shared = f", {len(first.shared)} shared" if first.shared else ""
        return f"{first.active} of {first.count}{shared}" + (
            f", in {first.groups} KV groups" if first.groups > 1 else ""
        )

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """(step, loss) of the validations during the run, over packed sequences."""
        return [(record["step"], record["loss"]) for record in read_records(self.folder / "validation.jsonl")]

    @cached_property
    def _newest(self) -> Path:
        return layout.resolve_checkpoint(self.folder)

    @property
    def source(self) -> Path:
        """The checkpoint that tuning began with; for an initial checkpoint, the one that it was made of."""
        assert self.config.train.init_from is not None, "checked above"
        initial = Path(self.config.train.init_from)
        was_prepared = initial.name == "start" and (initial / layout.CONFIG).is_file()
        return Path(layout.read_config(initial).train.init_from or initial if was_prepared else initial).resolve()

    @property
    def conditions(self) -> dict[str, Any]:
        """The values in which runs must agree to be compared."""
        newest, train = layout.read_state(self._newest), self.config.train
        return {
            "train.init_from": self.source,
            "data": newest.data[:12],
            "run.seed": self.config.run.seed,
            "tokens": newest.tokens,
            "train.total_tokens": train.total_tokens,
            "train.sequence_length": train.sequence_length,
            "train.global_batch_size": train.global_batch_size,
            **{f"optimizer.{key}": value for key, value in asdict(self.config.optimizer).items()},
        }

    def require_same_data(self) -> None:
        """Raise UserError unless data.dir holds the dataset of the training: documents of another were not held out."""
        trained_on = layout.read_state(self._newest).data[:12]
        if (current := load_prepared(self.config).hash[:12]) != trained_on:
            raise UserError(
                f"{self.folder}: was trained on the dataset {trained_on}. Got {current} in {data_dir(self.config)}: "
                "prepare it as it was, or documents that were trained on count as held out."
            )

    def _losses(self, checkpoint: Path) -> list[float]:
        """Losses of ``checkpoint`` by document, from the file where they were measured before."""
        weights = layout.read_state(checkpoint).files
        key = f"{checkpoint.resolve()} {sorted(weights.items())[-1][1].sha256[:12]} {self.max_documents or 'all'}"
        measured = self._measured_losses()
        if key not in measured:
            model = build_single_process(layout.read_config(checkpoint), layout.read_weights(checkpoint))
            documents = held_out_documents(self.config, self.max_documents)
            measured[key] = document_losses(model.to(groups.device(0)), documents)
            write_json(self._file, measured)
        return measured[key]

    def _measured_losses(self) -> dict[str, Any]:
        remedy = "Delete it to measure again."
        return read_json(self._file, "losses by document", remedy) if self._file.exists() else {}


def tuning_table(control: TunedRun, runs: Sequence[TunedRun]) -> str:
    """Markdown: a table of the ``runs`` against the dense ``control``, and the validation losses of all of them.

    Raises:
        UserError: the control is no dense model; a run started from another checkpoint, or has other training settings
            or other data; or data.dir no longer holds the data that the runs were trained on.
    """
    if control.config.moh.enabled:
        raise UserError(
            f"{control.folder}: the control, named first, must be of a dense model. Got {control.heads} heads."
        )
    conditions = control.conditions
    for run in runs:
        refuse_differences(f"{run.folder} cannot be compared with {control.folder}", conditions, run.conditions)
    for run in (control, *runs):
        run.require_same_data()
    dense, tuned_dense = control.before, control.after
    lines = [
        f"{len(dense)} held-out documents of at most {control.config.train.sequence_length} tokens; loss in nats a "
        "token; ± is the standard error over documents, of differences and shares over the same documents.",
        "",
        "| run | heads | tokens | before tuning | after | above the tuned dense model | recovered |",
        "|---|---|---|---|---|---|---|",
        f"| {control.folder.name} | {control.heads} | {control.tokens:,} | {mean(dense)} | {mean(tuned_dense)} | | |",
    ]
    for run in runs:
        above = mean([loss - dense_loss for loss, dense_loss in zip(run.after, tuned_dense, strict=True)])
        share = recovered_share(run.before, run.after, tuned_dense)
        lines.append(
            f"| {run.folder.name} | {run.heads} | {run.tokens:,} | {mean(run.before)} | {mean(run.after)} | {above} "
            f"| {100 * share.value:.1f} ± {100 * share.error:.1f} % |"
        )
    lines += ["", "Loss of the runs' own validations, over packed sequences:", "", "| run | step: loss |", "|---|---|"]
    lines += [
        f"| {run.folder.name} | {', '.join(f'{step}: {loss:.3f}' for step, loss in run.validation_losses)} |"
        for run in (control, *runs)
    ]
    return "\n".join(lines)
