#!/usr/bin/env python
"""Makes the text of docs/continue_tuning.md from two Debian packages: the Anarchist FAQ, and the kernel's manual.

    apt-get download anarchism linux-doc-6.1
    for package in *.deb; do dpkg-deb -x $package PACKAGES; done
    .venv/bin/python tools/make_tuning_corpus.py PACKAGES corpus/tuning.jsonl.gz

Each record is a document: a section of an essay, or a file of the manual. Short documents, appendices and translations
are dropped. Of each kind the same number is kept, those with the lowest hashes, so that a run reads both.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

ESSAYS = "usr/share/doc/anarchism/markdown"
MANUAL = "usr/share/doc/linux-doc-6.1/Documentation"
SHORTEST = 3000
"""The fewest characters of a document, about one sequence of 512 tokens."""
HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def read(file: Path) -> str:
    """The text of a file that may be compressed."""
    content = file.read_bytes()
    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8", errors="replace")


def essays(packages: Path) -> Iterator[str]:
    """The sections of the essays, without the targets of links."""
    for file in sorted((packages / ESSAYS).glob("*.md*")):
        if not file.name.startswith(("append", "alinks", "links", "biblio")):
            for section in HEADING.split(read(file)):
                yield LINK.sub(r"\1", section).strip()


def manual(packages: Path) -> Iterator[str]:
    """The files of the manual that are reStructuredText."""
    for file in sorted((packages / MANUAL).rglob("*.rst*")):
        if "translations" not in file.parts and file.is_file():
            yield read(file).strip()


def chosen(texts: Iterator[str], count: int) -> list[str]:
    """``count`` different texts that are long enough, in the order of their hashes."""
    long = {text for text in texts if len(text) >= SHORTEST}
    # This is another hash than that by which prepare_data chooses validation documents: both choices are independent.
    return sorted(long, key=lambda text: hashlib.blake2b(text.encode()).digest())[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, metavar="PACKAGES")
    parser.add_argument("output", type=Path)
    parser.add_argument("--documents", type=int, default=440, metavar="N", help="of each kind")
    args = parser.parse_args()
    lines = io.StringIO()
    for kind, texts in (("essay", essays(args.packages)), ("manual", manual(args.packages))):
        found = chosen(texts, args.documents)
        print(f"{kind}: {len(found):,} documents, {sum(map(len, found)):,} characters")
        lines.writelines(json.dumps({"kind": kind, "text": text}, ensure_ascii=False) + "\n" for text in found)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Without a time stamp the same text gives the same bytes.
    args.output.write_bytes(gzip.compress(lines.getvalue().encode("utf-8"), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
