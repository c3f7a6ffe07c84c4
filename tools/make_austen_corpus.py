"""Makes configs/data/austen.jsonl.gz from the Debian package r-cran-janeaustenr. Needs Rscript (r-base-core).

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb PACKAGE
    Rscript -e 'lazyLoad("PACKAGE/usr/lib/R/site-library/janeaustenr/data/Rdata", envir = (e <- new.env()))
                for (n in ls(e)) if (is.character(e[[n]])) writeLines(e[[n]], file.path("NOVELS", paste0(n, ".txt")))'
    .venv/bin/python tools/make_austen_corpus.py NOVELS configs/data/austen.jsonl.gz

NOVELS then holds one hard-wrapped text for each novel. The output holds one record for each chapter, with one line for
each paragraph. Title pages, headings, closing words, notes on the edition and rows of asterisks are dropped; nothing
else is changed.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

NOVELS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}
CHAPTER = re.compile(r"chapter (?:\d+|[ivxl]+)", re.IGNORECASE)
DROPPED = re.compile(r"(?:volume [ivx]+|finis|the end|[* ]+|\[End volume .*|\[At this point .*)", re.IGNORECASE)
BACK_MATTER = "A NOTE ON THE TEXT"


def paragraphs(lines: list[str]) -> Iterator[str]:
    """The paragraphs of a hard-wrapped text, each on one line with single spaces."""
    for filled, group in itertools.groupby(lines, key=lambda line: bool(line.strip())):
        if filled:
            yield " ".join(" ".join(group).split())


def chapters(lines: list[str]) -> Iterator[str]:
    """The text of each chapter in order; text before the first one is dropped."""
    chapter: list[str] | None = None
    for paragraph in paragraphs(lines):
        if CHAPTER.fullmatch(paragraph) or paragraph == BACK_MATTER:
            if chapter:
                yield "\n".join(chapter)
            chapter = []
            if paragraph == BACK_MATTER:
                return
        elif chapter is not None and not DROPPED.fullmatch(paragraph):
            chapter.append(paragraph)
    if chapter:
        yield "\n".join(chapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("novels", type=Path, metavar="NOVELS")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    lines = io.StringIO()
    for name, title in NOVELS.items():
        novel = (args.novels / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        for number, text in enumerate(chapters(novel), start=1):
            lines.write(json.dumps({"title": f"{title}, chapter {number}", "text": text}, ensure_ascii=False) + "\n")
    # Without a time stamp the same text gives the same bytes.
    args.output.write_bytes(gzip.compress(lines.getvalue().encode("utf-8"), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
