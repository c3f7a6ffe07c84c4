"""Converts models from and to Hugging Face folders.

moh-convert hf-to-megatron --hf-dir DIR --save-dir CKPT [section.key=value ...]
moh-convert megatron-to-hf --load-dir CKPT --hf-dir DIR
moh-convert official-to-hf --load-dir DIR --hf-dir DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from moh_megatron.cli import add_common_options, command_parser, exit_code, parse_overrides, path_argument
from moh_megatron.io.console import print_result, slow_imports


def parse_arguments() -> argparse.Namespace:
    parser = command_parser("Convert models between Megatron-core and Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_hf = commands.add_parser("megatron-to-hf", help="export a checkpoint as a folder for AutoModelForCausalLM")
    to_hf.add_argument(
        "--load-dir", type=path_argument, required=True, metavar="CKPT", help="a checkpoint, or a folder of them"
    )
    to_hf.add_argument("--format", choices=["moh", "llama", "official"], default="moh", help="default: moh")
    to_hf.add_argument("--summary", type=path_argument, metavar="FILE", help="summary.json to add hf_max_logit_diff to")
    to_hf.add_argument("--dry-run", action="store_true", help="print what would be exported, and stop")
    official = commands.add_parser("official-to-hf", help="convert SkyworkAI's published form of a MoH-LLaMA")
    official.add_argument(
        "--load-dir", "--official-dir", type=path_argument, required=True, metavar="DIR", help="its folder"
    )
    from_hf = commands.add_parser("hf-to-megatron", help="import a LLaMA, or an export, as a checkpoint")
    from_hf.add_argument("--save-dir", type=path_argument, required=True, metavar="CKPT", help="the checkpoint to make")
    from_hf.add_argument("--config", type=path_argument, metavar="YAML", help="what config.json does not say")
    from_hf.add_argument("overrides", metavar="section.key=value", nargs="*", help="a value of the configuration")
    for command in (to_hf, official, from_hf):
        add_common_options(command)
        command.add_argument(
            "--hf-dir", type=path_argument, required=True, metavar="DIR", help="the Hugging Face folder"
        )
        command.add_argument("--verify", action="store_true", help="load both sides, and print how much they differ")
        command.add_argument("--json", action="store_true", help="print the result as JSON, for another program")
    for command in (to_hf, official):
        command.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: the precision of the weights")
    for command in (official, from_hf):
        command.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin, tensors only")
    return parse_overrides(parser)


@dataclass(frozen=True)
class Result:
    """What a conversion made, as a sentence and as JSON."""

    sentence: str
    values: dict[str, object]

    @classmethod
    def of_export(cls, source: Path, folder: Path, difference: float | None) -> Result:
        """The result of an export; ``difference`` is that of the logits, None if they were not compared."""
        if difference is None:
            compared = "The logits were not compared; --verify compares them."
        else:
            compared = f"The logits of the reloaded folder differ from the source's by at most {difference:.1e}."
        sentence = f"{source} is now the Hugging Face folder {folder}. {compared}"
        return cls(sentence, {"hf_dir": str(folder), "hf_max_logit_diff": difference})


def megatron_to_hf(arguments: argparse.Namespace) -> Result | None:
    from moh_megatron.checkpoint import layout
    from moh_megatron.checkpoint.hf.early_checks import check_export
    from moh_megatron.monitor.records import merge_summary, read_summary

    check_export(arguments.load_dir, arguments.hf_dir, arguments.format)
    if arguments.summary is not None:
        read_summary(arguments.summary)
    with slow_imports():
        # Hashing the checkpoint leaves the interpreter free for slow imports in another thread.
        with ThreadPoolExecutor(1) as other:
            other.submit(import_module, "moh_megatron.checkpoint.hf.convert")
            checkpoint = layout.resolve_checkpoint(arguments.load_dir)
        from moh_megatron.checkpoint.hf import convert, hf_export
    from moh_megatron.config.load import dump_config

    if arguments.dry_run:
        hf_export.check_replaceable(arguments.hf_dir, checkpoint)
        config = layout.read_config(checkpoint)
        hf_export.check_form(config, arguments.format)
        print_result(
            f"# {checkpoint} -> {arguments.hf_dir} in {arguments.dtype or 'its precision'}, with the configuration:"
        )
        print_result(dump_config(config).removesuffix("\n"))
        return None
    difference = convert.megatron_to_hf(
        checkpoint, arguments.hf_dir, arguments.dtype, form=arguments.format, verify=arguments.verify
    )
    if arguments.summary is not None:
        merge_summary(arguments.summary, {"hf_max_logit_diff": difference})
    return Result.of_export(checkpoint, arguments.hf_dir, difference)


def hf_to_megatron(arguments: argparse.Namespace) -> Result:
    from moh_megatron.checkpoint.hf.early_checks import check_import

    check_import(
        arguments.hf_dir,
        arguments.save_dir,
        arguments.config,
        arguments.overrides,
        allow_pickle=arguments.allow_pickle,
    )
    with slow_imports():
        from moh_megatron.checkpoint.hf import hf_import

    hf_import.hf_to_megatron(
        arguments.hf_dir,
        arguments.save_dir,
        arguments.config,
        arguments.overrides,
        new_tensors=lambda config: import_module("moh_megatron.upcycle.routers").initial_routers(config),
        allow_pickle=arguments.allow_pickle,
        verify=arguments.verify,
    )
    sentence = f"{arguments.hf_dir} is now the checkpoint {arguments.save_dir}."
    return Result(sentence, {"save_dir": str(arguments.save_dir)})


def official_to_hf(arguments: argparse.Namespace) -> Result:
    from moh_megatron.checkpoint.hf.early_checks import check_official

    check_official(arguments.load_dir, arguments.hf_dir, allow_pickle=arguments.allow_pickle)
    with slow_imports():
        from moh_megatron.checkpoint.hf import convert

    difference = convert.official_to_hf(
        arguments.load_dir,
        arguments.hf_dir,
        arguments.dtype,
        allow_pickle=arguments.allow_pickle,
        verify=arguments.verify,
    )
    return Result.of_export(arguments.load_dir, arguments.hf_dir, difference)


def main() -> None:
    commands = {"megatron-to-hf": megatron_to_hf, "hf-to-megatron": hf_to_megatron, "official-to-hf": official_to_hf}
    arguments = parse_arguments()
    if result := commands[arguments.command](arguments):
        print_result(json.dumps(result.values) if arguments.json else result.sentence)


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
