"""Work that reports nothing is seen to go on, and expected warnings of libraries are not shown."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest

from moh_megatron.io.console import console_logging, elapsed_bar, errors_only, warnings_hidden


class Stream(io.StringIO):
    """Not a terminal; ``shown_again`` is set when a text was written three times."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self.shown_again = threading.Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.getvalue().count(self._text) >= 3:
            self.shown_again.set()
        return count


def test_elapsed_bar_is_shown_again_and_again_until_the_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(" so far")
    monkeypatch.setattr(sys, "stderr", stream)
    with console_logging(), elapsed_bar("learn", interval=0.001):
        assert stream.getvalue().startswith("\rlearn: 00:0")
        assert stream.shown_again.wait(60)
    assert "so far" not in stream.getvalue().rsplit("learn: ", 1)[1]
    assert not [thread for thread in threading.enumerate() if thread.name == "learn"]


def test_elapsed_bar_of_work_that_fails_ends_with_it() -> None:
    with pytest.raises(ZeroDivisionError), console_logging(), elapsed_bar("divide"):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name == "divide"]


def test_elapsed_bar_is_hidden_where_only_errors_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with console_logging(), errors_only(), elapsed_bar("learn", interval=0.001):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_expected_warnings_are_hidden_unless_verbose(level: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(level, "moh_megatron")
    library = logging.getLogger("a library")
    with warnings_hidden(library.name):
        library.warning("expected")
        library.error("an error")
    library.warning("unexpected")
    shown = ["expected"] if level == logging.DEBUG else []
    assert [record.message for record in caplog.records] == [*shown, "an error", "unexpected"]
