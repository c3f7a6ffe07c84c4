#!/usr/bin/env python
"""Convert checkpoints: python pipelines/convert.py megatron-to-hf --load-dir CKPT --hf-dir DIR."""

import argparse
import json
import sys
from pathlib import Path

from moh_megatron.cli import exit_code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert models between Megatron-core and Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_hf = commands.add_parser(
        "megatron-to-hf",
        help="export a checkpoint as a folder for AutoModelForCausalLM",
        description="Export a checkpoint as a Hugging Face folder, reload it and compare the logits.",
    )
    to_hf.add_argument(
        "--load-dir", type=Path, required=True, metavar="CKPT", help="a checkpoint, a folder of them, or a run folder"
    )
    to_hf.add_argument("--hf-dir", type=Path, required=True, metavar="DIR", help="the folder to make")
    to_hf.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: the precision of the training")
    to_hf.add_argument("--summary", type=Path, metavar="FILE", help="summary.json to add hf_max_logit_diff to")
    to_hf.add_argument("--dry-run", action="store_true", help="print what would be done and stop")

    from_hf = commands.add_parser(
        "hf-to-megatron",
        help="import a LLaMA, or a folder that this project exported, as a checkpoint",
        description="Import a Hugging Face folder as a checkpoint, as train.init_from takes it. Nothing in it is run.",
    )
    from_hf.add_argument("--hf-dir", type=Path, required=True, metavar="DIR", help="the folder to read")
    from_hf.add_argument("--save-dir", type=Path, required=True, metavar="CKPT", help="the checkpoint to make")
    from_hf.add_argument("--config", type=Path, metavar="YAML", help="what the checkpoint's configuration states")
    from_hf.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin, as tensors only")
    from_hf.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="a value of the configuration, such as parallel.tensor=2 or moh.enabled=true; default: as config.json",
    )
    # argparse takes positional arguments in one run only: what stands behind a later option comes back unknown.
    arguments, rest = parser.parse_known_args()
    if unknown := [each for each in rest if each.startswith("-") or "overrides" not in arguments]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    return arguments


def hf_to_megatron(arguments: argparse.Namespace) -> None:
    from moh_megatron.checkpoint.hf_import import hf_to_megatron
    from moh_megatron.upcycle.routers import initial_routers

    hf_to_megatron(
        arguments.hf_dir,
        arguments.save_dir,
        arguments.config,
        arguments.overrides,
        new_tensors=initial_routers,
        report=lambda message: print(message, file=sys.stderr),
        allow_pickle=arguments.allow_pickle,
    )
    print(json.dumps({"save_dir": str(arguments.save_dir)}))


def megatron_to_hf(arguments: argparse.Namespace) -> None:
    from moh_megatron.checkpoint import convert, hf, native
    from moh_megatron.config.load import dump_config
    from moh_megatron.monitor import records

    checkpoint = native.resolve_checkpoint(arguments.load_dir, lambda message: print(message, file=sys.stderr))
    config = native.read_config(checkpoint)
    if arguments.summary is not None:
        records.read_summary(arguments.summary)
    if arguments.dry_run:
        hf.check_replaceable(arguments.hf_dir)
        dtype = arguments.dtype or config.train.precision
        print(
            f"# {checkpoint} -> {arguments.hf_dir} in {dtype}, with the configuration:\n{dump_config(config)}", end=""
        )
        return
    difference = convert.megatron_to_hf(checkpoint, arguments.hf_dir, arguments.dtype)
    if arguments.summary is not None:
        records.merge_summary(arguments.summary, {"hf_max_logit_diff": difference})
    print(json.dumps({"hf_dir": str(arguments.hf_dir), "hf_max_logit_diff": difference}))


def main() -> None:
    arguments = parse_arguments()
    {"megatron-to-hf": megatron_to_hf, "hf-to-megatron": hf_to_megatron}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
