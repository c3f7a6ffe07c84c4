#!/usr/bin/env python
"""Inspects prepared datasets.

.venv/bin/python tools/inspect_dataset.py show DATASET  prints counts, lengths, and what was left out
.venv/bin/python tools/inspect_dataset.py histogram DATASET OUT.png  draws the lengths of the documents
.venv/bin/python tools/inspect_dataset.py sample DATASET --split train --at 0 17 -1 [--tokens 80]  prints documents
.venv/bin/python tools/inspect_dataset.py verify DATASET  compares every file with its hash, the index with the tokens
.venv/bin/python tools/inspect_dataset.py diff DATASET OTHER  prints what differs between two manifests

DATASET is the folder with manifest.json. The exit code is 0, or 2 if something is wrong or different.
"""

from __future__ import annotations

import argparse
import sys

from moh_megatron.cli import CommandParser, exit_code, path_argument, png_file
from moh_megatron.data.dataset_manifest import SPLITS, load_manifest
from moh_megatron.data.prepare.inspect import differences, draw_lengths, lengths, problems, sample, unverified
from moh_megatron.io.console import print_result


def show(args: argparse.Namespace) -> int:
    manifest = load_manifest(args.dataset)
    print_result(manifest.summary())
    for split in SPLITS:
        if values := lengths(args.dataset, split):
            print_result(
                f"{split}, tokens a document: " + ", ".join(f"{name} {value:,}" for name, value in values.items())
            )
    for record in manifest.inputs:
        details = f", {record.bytes:,} bytes, sha256 {record.sha256[:12]}" if record.sha256 else ""
        print_result(f"input: {record.path}{details}")
    print_result(f"made by: {manifest.command}")
    return 0


def histogram(args: argparse.Namespace) -> int:
    draw_lengths(args.dataset, args.picture)
    print_result(args.picture)
    return 0


def samples(args: argparse.Namespace) -> int:
    for position in args.at:
        number, tokens, text = sample(args.dataset, args.split, position, args.tokens)
        print_result(f"== {args.split} document {number:,}, {tokens:,} tokens\n{text}")
    return 0


def verify(args: argparse.Namespace) -> int:
    found = problems(args.dataset)
    for line in (*unverified(load_manifest(args.dataset)), *found):
        print_result(line)
    if not found:
        print_result(f"{args.dataset}: every file is as its manifest says")
    return 2 if found else 0


def diff(args: argparse.Namespace) -> int:
    found = differences(load_manifest(args.dataset), load_manifest(args.other))
    print_result("\n".join(found) if found else "no difference")
    return 2 if found else 0


def main() -> int:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (show, histogram, samples, verify, diff):
        subparser = commands.add_parser("sample" if command is samples else command.__name__)
        subparser.set_defaults(command=command)
        subparser.add_argument("dataset", type=path_argument, metavar="DATASET")
        if command is histogram:
            subparser.add_argument("picture", type=png_file, metavar="OUT.png")
        elif command is samples:
            subparser.add_argument("--split", choices=SPLITS, default="train")
            subparser.add_argument(
                "--at", type=int, nargs="+", default=[0], help="numbers of documents; -1 is the last"
            )
            subparser.add_argument("--tokens", type=int, default=200, help="most tokens to decode of each document")
        elif command is diff:
            subparser.add_argument("other", type=path_argument, metavar="OTHER")
    args = parser.parse_args()
    return args.command(args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
