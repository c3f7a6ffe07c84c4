"""The progress bar: MB/s of text, documents, tokens, time left."""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm import tqdm

from moh_megatron.data.prepare.encode import Progress


def progress_bar(what: str, total: int, unit: str = "B") -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", dynamic_ncols=True)


class Reporter:
    """Feeds the progress bar: bytes on disk, and what they gave. ``check`` hears of it whenever a part is finished."""

    def __init__(self, bar: tqdm, check: Callable[[Progress], None]) -> None:
        self._bar, self._check = bar, check
        self._done = Progress()
        self._started = time.monotonic()

    def __call__(self, new: Progress) -> None:
        done = self._done = Progress(*map(sum, zip(self._done, new, strict=True)))
        rate = done.text / 1e6 / max(time.monotonic() - self._started, 1e-6)
        rejects = f", {done.rejects:,} rejects" if done.rejects else ""
        self._bar.set_postfix_str(
            f"{rate:.1f} MB/s of text, {done.documents:,} documents, {done.tokens:,} tokens{rejects}", refresh=False
        )
        self._bar.update(new.read)
        if new.parts and done.rejects:
            self._check(done)
