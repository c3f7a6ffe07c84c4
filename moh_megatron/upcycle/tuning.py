"""What tuning won back: held-out documents under the models before and after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from moh_megatron.checkpoint import native
from moh_megatron.config.errors import UserError
from moh_megatron.config.heads import layer_heads
from moh_megatron.config.load import load_config
from moh_megatron.config.paths import require_folder
from moh_megatron.data.prepared import load_prepared
from moh_megatron.model.single import build_single_process
from moh_megatron.monitor.records import read_records, write_json
from moh_megatron.parallel import groups
from moh_megatron.upcycle.compare import document_losses, mean, recovered
from moh_megatron.upcycle.documents import held_out


class Arm:
    """A run of continue-tuning, in its folder. ``most`` limits the documents.

    Raises:
        UserError: the folder holds no such run.
    """

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.folder, self.most = folder, most
        require_folder(folder, "the folder of a run")
        if not (folder / native.CONFIG).is_file():
            raise UserError(f"{folder}: must be the folder of a run. Got one without {native.CONFIG}.")
        self.config = load_config(folder / native.CONFIG)
        if self.config.train.init_from is None:
            raise UserError(f"{folder}: must be a run of pipelines/continue_tune.py. Got train.init_from: null.")
        self._file = folder / "documents.json"

    @cached_property
    def before(self) -> list[float]:
        """Losses of the model that tuning started from."""
        assert self.config.train.init_from is not None, "written by pipelines/continue_tune.py"
        return self._losses(native.resolve_checkpoint(self.config.train.init_from))

    @cached_property
    def after(self) -> list[float]:
        """Losses of the newest checkpoint."""
        return self._losses(native.resolve_checkpoint(self.folder))

    @property
    def tokens(self) -> int:
        """That the newest checkpoint has seen."""
        return native.read_state(native.resolve_checkpoint(self.folder)).tokens

    @property
    def heads(self) -> str:
        """Active and shared ones of the first layer, of how many."""
        first = layer_heads(self.config.model, self.config.moh)[0]
        return f"{first.active} of {first.count}" + (f", {len(first.shared)} shared" if first.shared else "")

    @property
    def along_the_way(self) -> list[tuple[int, float]]:
        """(step, loss) of the run's own validations, over packed sequences."""
        return [(record["step"], record["loss"]) for record in read_records(self.folder / "validation.jsonl")]

    def _losses(self, checkpoint: Path) -> list[float]:
        """By document; measured once for each checkpoint and number of documents."""
        weights = native.read_state(checkpoint).files
        key = f"{checkpoint.resolve()} {sorted(weights.items())[-1][1].sha256[:12]} {self.most or 'all'}"
        known: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        if key not in known:
            model = build_single_process(native.read_config(checkpoint), native.read_weights(checkpoint))
            known[key] = document_losses(model.to(groups.device(0)), held_out(self.config, self.most))
            write_json(self._file, known)
        return known[key]


def as_markdown(control: Arm, arms: Sequence[Arm]) -> str:
    """A table of the arms against the dense ``control``, and the losses along the way; ± is the standard error.

    Raises:
        UserError: an arm was measured on other documents than the control.
    """
    for arm in arms:
        there, here = (
            (load_prepared(each.config).hash[:12], each.config.train.sequence_length) for each in (control, arm)
        )
        if there != here:
            raise UserError(
                f"{arm.folder}: must have the data and train.sequence_length of {control.folder}, {there[0]} and "
                f"{there[1]}, to be compared with it. Got {here[0]} and {here[1]}."
            )
    dense, tuned_dense = control.before, control.after
    lines = [
        f"{len(dense)} held-out documents of at most {control.config.train.sequence_length} tokens; loss in nats a "
        "token; ± is the standard error over documents, of differences and shares over the same documents.",
        "",
        "| run | heads | tokens | before tuning | after | above the tuned dense model | recovered |",
        "|---|---|---|---|---|---|---|",
        f"| {control.folder.name} | {control.heads} | {control.tokens:,} | {mean(dense)} | {mean(tuned_dense)} | | |",
    ]
    for arm in arms:
        above = mean([here - there for here, there in zip(arm.after, tuned_dense, strict=True)])
        share = recovered(arm.before, arm.after, tuned_dense)
        lines.append(
            f"| {arm.folder.name} | {arm.heads} | {arm.tokens:,} | {mean(arm.before)} | {mean(arm.after)} | {above} "
            f"| {100 * share.value:.1f} ± {100 * share.error:.1f} % |"
        )
    lines += ["", "Loss of the runs' own validations, over packed sequences:", "", "| run | step: loss |", "|---|---|"]
    lines += [
        f"| {arm.folder.name} | {', '.join(f'{step}: {loss:.3f}' for step, loss in arm.along_the_way)} |"
        for arm in (control, *arms)
    ]
    return "\n".join(lines)
