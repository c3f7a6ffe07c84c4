"""printable: what a terminal would obey becomes an escape, in messages, results, errors and progress bars."""

from __future__ import annotations

import logging
import sys

import pytest

from moh_megatron.cli import command_parser, exit_code
from moh_megatron.io.console import print_result, progress_bar
from moh_megatron.io.errors import UserError
from moh_megatron.io.printable import printable

RAW = "a\x1b[2Jb\x07\r\x9b31m\u202etxt.exe\u2066\ud800\x7f"
SHOWN = r"a\x1b[2Jb\x07\x0d\x9b31m\u202etxt.exe\u2066\ud800\x7f"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (RAW, SHOWN),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\u200e\u200f\u061c\u2028\u2029", r"\u200e\u200f\u061c\u2028\u2029"),
        ("naïve — 漢字 🙂 עברית \u00a0", "naïve — 漢字 🙂 עברית \u00a0"),
    ],
)
def test_control_characters_become_escapes_and_text_stays(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_every_control_character_but_newline_and_tab_is_escaped() -> None:
    controls = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]
    kept = [character for character in controls if printable(character) == character]
    assert kept == ["\t", "\n"]


def test_nothing_that_a_command_shows_holds_raw_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        logging.getLogger("moh_megatron.example").warning("%s", RAW)
        print_result(RAW)
        progress_bar(RAW, total=1, unit="part").close()
        raise UserError(RAW)

    assert exit_code(main) == 2
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}\n"
    assert f"warning: {SHOWN}\n" in err
    assert f"{SHOWN}:   0%" in err
    assert err.endswith(f"error: {SHOWN}\n")


def test_traceback_shows_no_raw_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise ZeroDivisionError(RAW)

    assert exit_code(main) == 1
    assert capsys.readouterr().err.endswith(f"ZeroDivisionError: {SHOWN}\n")


def test_unknown_argument_is_shown_without_raw_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", RAW])
    with pytest.raises(SystemExit) as ended:
        command_parser("Do something.").parse_args()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {SHOWN}\n")
