#!/usr/bin/env python
"""Look into prepared datasets.

python tools/inspect_dataset.py show DATASET                        counts, lengths, what was left out
python tools/inspect_dataset.py histogram DATASET OUT.png           lengths of the documents, as a picture
python tools/inspect_dataset.py sample DATASET --split train --at 0 17 -1 [--tokens 80]   decoded documents
python tools/inspect_dataset.py verify DATASET                      every hash, and the index against the tokens
python tools/inspect_dataset.py diff DATASET OTHER                  what differs between two manifests

DATASET is the folder with manifest.json. The exit code is 0, or 2 where something is wrong or different.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moh_megatron.cli import exit_code
from moh_megatron.data.dataset_manifest import SPLITS, load_manifest
from moh_megatron.data.prepare.inspect import differences, draw_lengths, lengths, problems, sample, unverified


def show(args: argparse.Namespace) -> int:
    manifest = load_manifest(args.dataset)
    print(manifest.summary())
    for name in SPLITS:
        if values := lengths(args.dataset, name):
            print(f"{name}, tokens a document: " + ", ".join(f"{what} {value:,}" for what, value in values.items()))
    for each in manifest.inputs:
        print(f"input: {each.path}" + (f", {each.bytes:,} bytes, sha256 {each.sha256[:12]}" if each.sha256 else ""))
    print(f"made by: {manifest.command}")
    return 0


def histogram(args: argparse.Namespace) -> int:
    draw_lengths(args.dataset, args.picture)
    print(args.picture)
    return 0


def samples(args: argparse.Namespace) -> int:
    for position in args.at:
        number, tokens, text = sample(args.dataset, args.split, position, args.tokens)
        print(f"== {args.split} document {number:,}, {tokens:,} tokens\n{text}")
    return 0


def verify(args: argparse.Namespace) -> int:
    found = problems(args.dataset)
    for line in (*unverified(load_manifest(args.dataset)), *found):
        print(line)
    if not found:
        print(f"{args.dataset}: every file is as its manifest says")
    return 2 if found else 0


def diff(args: argparse.Namespace) -> int:
    found = differences(load_manifest(args.dataset), load_manifest(args.other))
    print("\n".join(found) if found else "no difference")
    return 2 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (show, histogram, samples, verify, diff):
        each = commands.add_parser("sample" if command is samples else command.__name__)
        each.set_defaults(command=command)
        each.add_argument("dataset", type=Path, metavar="DATASET")
        if command is histogram:
            each.add_argument("picture", type=Path, metavar="OUT.png")
        elif command is samples:
            each.add_argument("--split", choices=SPLITS, default="train")
            each.add_argument("--at", type=int, nargs="+", default=[0], help="numbers of documents; -1 is the last")
            each.add_argument("--tokens", type=int, default=200, help="at most so many of each")
        elif command is diff:
            each.add_argument("other", type=Path, metavar="OTHER")
    args = parser.parse_args()
    return args.command(args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
