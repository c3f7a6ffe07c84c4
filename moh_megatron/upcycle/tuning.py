"""What tuning won back: held-out documents under the models before and after it."""

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
from moh_megatron.data.prepared import load_prepared
from moh_megatron.io.errors import UserError, refuse_differences
from moh_megatron.io.json_file import read_json, write_json
from moh_megatron.model.single import build_single_process
from moh_megatron.monitor.records import read_records
from moh_megatron.parallel import groups
from moh_megatron.upcycle.held_out import held_out
from moh_megatron.upcycle.loss_and_kl import document_losses, mean, recovered


class Arm:
    """A run of continue-tuning, in its folder. ``most`` limits the documents.

    Raises:
        UserError: the folder holds no such run.
    """

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.folder, self.most = folder, most
        require_folder(folder, "the folder of a run")
        if not (folder / layout.CONFIG).is_file():
            raise UserError(f"{folder}: must be the folder of a run. Got one without {layout.CONFIG}.")
        self.config = load_config(folder / layout.CONFIG)
        if self.config.train.init_from is None:
            raise UserError(f"{folder}: must be a run of pipelines/continue_tune.py. Got train.init_from: null.")
        self._file = folder / "documents.json"

    @cached_property
    def before(self) -> list[float]:
        """Losses of the model that tuning started from."""
        assert self.config.train.init_from is not None, "written by pipelines/continue_tune.py"
        return self._losses(layout.resolve_checkpoint(self.config.train.init_from))

    @cached_property
    def after(self) -> list[float]:
        """Losses of the newest checkpoint."""
        return self._losses(self._newest)

    @property
    def tokens(self) -> int:
        """That the newest checkpoint has seen."""
        return layout.read_state(self._newest).tokens

    @property
    def heads(self) -> str:
        """Active and shared ones of the first layer, of how many."""
        first = layer_heads(self.config.model, self.config.moh)[0]
        return f"{first.active} of {first.count}" + (f", {len(first.shared)} shared" if first.shared else "")

    @property
    def along_the_way(self) -> list[tuple[int, float]]:
        """(step, loss) of the run's own validations, over packed sequences."""
        return [(record["step"], record["loss"]) for record in read_records(self.folder / "validation.jsonl")]

    @cached_property
    def _newest(self) -> Path:
        return layout.resolve_checkpoint(self.folder)

    @property
    def source(self) -> Path:
        """The checkpoint that tuning began with; of a start, the one it was made of."""
        assert self.config.train.init_from is not None, "checked above"
        start = Path(self.config.train.init_from)
        made_here = start.name == "start" and (start / layout.CONFIG).is_file()
        return Path(layout.read_config(start).train.init_from or start if made_here else start).resolve()

    @property
    def conditions(self) -> dict[str, Any]:
        """What runs that can be compared have in common."""
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

    def require_its_data(self) -> None:
        """Raise UserError unless data.dir holds what the run was trained on: else nothing in it is held out."""
        there = layout.read_state(self._newest).data[:12]
        if (here := load_prepared(self.config).hash[:12]) != there:
            raise UserError(
                f"{self.folder}: was trained on the dataset {there}. Got {here} in {data_dir(self.config)}: prepare it "
                "as it was, or documents that were trained on count as held out."
            )

    def _losses(self, checkpoint: Path) -> list[float]:
        """By document; measured once for each checkpoint and number of documents."""
        weights = layout.read_state(checkpoint).files
        key = f"{checkpoint.resolve()} {sorted(weights.items())[-1][1].sha256[:12]} {self.most or 'all'}"
        known = self._known()
        if key not in known:
            model = build_single_process(layout.read_config(checkpoint), layout.read_weights(checkpoint))
            known[key] = document_losses(model.to(groups.device(0)), held_out(self.config, self.most))
            write_json(self._file, known)
        return known[key]

    def _known(self) -> dict[str, Any]:
        remedy = "Delete it to measure again."
        return read_json(self._file, "losses by document", remedy) if self._file.exists() else {}


def as_markdown(control: Arm, arms: Sequence[Arm]) -> str:
    """A table of the arms against the dense ``control``, and the losses along the way; ± is the standard error.

    Raises:
        UserError: the control is no dense model; an arm started from another checkpoint, learned in another way or from
            other data; or the data is not what the runs were trained on.
    """
    if control.config.moh.enabled:
        raise UserError(
            f"{control.folder}: the control, named first, must be of a dense model. Got {control.heads} heads."
        )
    there = control.conditions
    for arm in arms:
        refuse_differences(f"{arm.folder} cannot be compared with {control.folder}", there, arm.conditions)
    for each in (control, *arms):
        each.require_its_data()
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
