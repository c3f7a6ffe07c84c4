"""slurm/check.py: whether a job may resume the run in its folder."""

from __future__ import annotations

import errno
import os
import runpy
from pathlib import Path

import pytest

from moh_megatron.io.errors import Fault, UserError
from moh_megatron.upcycle import provenance

DATA = "d" * 64
CHECK = runpy.run_path(str(Path(__file__).parents[3] / "slurm/check.py"))
check_resume = CHECK["check_resume"]


def test_run_folder_of_another_configuration_is_refused(tiny, fake_checkpoint, tmp_path):
    config = tiny({"run.dir": str(tmp_path)})
    check_resume(config, 1, DATA)
    fake_checkpoint(tmp_path / "checkpoints/step_00000005", config, step=5, data=DATA)
    check_resume(config, 1, DATA)
    with pytest.raises(UserError, match=r"run\.seed: expected 1234, got 5"):
        check_resume(tiny({"run.dir": str(tmp_path), "run.seed": 5}), 1, DATA)


def test_calibrated_heads_are_those_of_the_initial_checkpoint(tiny, fake_checkpoint, tmp_path):
    values = {"run.dir": str(tmp_path), "train.init_from": "dense"}
    chosen = {"moh.shared_heads": [[1, 6], [0, 3]]}
    fake_checkpoint(tmp_path / "start", tiny(values | chosen))
    provenance.write(tmp_path / "start", tiny(values | {"moh.shared_placement": "calibrated"}), "w" * 64, DATA)
    trained = tiny(values | chosen | {"train.init_from": str(tmp_path / "start")})
    fake_checkpoint(tmp_path / "checkpoints/step_00000005", trained, step=5, data=DATA)
    config = tiny(values | {"moh.shared_placement": "calibrated"})
    check_resume(config, 1, DATA)
    with pytest.raises(UserError, match=r"moh\.active_heads: expected 4, got 5"):
        check_resume(tiny(values | {"moh.shared_placement": "calibrated", "moh.active_heads": 5}), 1, DATA)


def test_run_folder_that_cannot_be_created_is_refused(tmp_path):
    CHECK["check_folder"](tmp_path / "new/run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"^{folder}: .* run.dir must be a folder that can be written"):
            CHECK["check_folder"](folder)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOTDIR, UserError), (errno.ESTALE, Fault)])
def test_failed_snapshot_has_the_same_message_in_every_start(monkeypatch, tmp_path, number, kind):
    def fail(config: object, folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    main = CHECK["main"]
    monkeypatch.setitem(main.__globals__, "snapshot", fail)
    arguments = ["configs/smoke.yaml", f"run.dir={tmp_path}", "--world-size", "2", "--no-data", "--snapshot"]
    messages = set()
    for start in ("7.0", "7.1"):
        monkeypatch.setattr("sys.argv", ["check.py", *arguments, start])
        with pytest.raises(kind) as caught:
            main()
        messages.add(str(caught.value))
    assert messages == {f"{tmp_path}: {os.strerror(number)}. run.dir must be a folder that can be written."}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("+export WANDB_API_KEY='k e y'", "+export WANDB_API_KEY=[removed]"),
        ('-  "api_key": "abc", "rate": 1', '-  "api_key": [removed], "rate": 1'),
        ("deepspeed:\n  comet:\n    api_key: abc\n", "deepspeed:\n  comet:\n    api_key: [removed]\n"),
        ("+MOH_STORE_TOKEN = 'abc'", "+MOH_STORE_TOKEN = [removed]"),
        ("+login('hf_abcdefghijklmnopqrst')", "+login('[removed]')"),
        ("https://user:word@host/path", "https://[removed]@host/path"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer [removed]"),
        ("+x = 'value of the variable'", "+x = '[removed]'"),
        (
            "+-----BEGIN PRIVATE KEY-----\n+abc\n+-----END PRIVATE KEY-----\n+y",
            "+-[removed]\n+[removed]\n+[removed]\n+y",
        ),
    ],
)
def test_secrets_are_removed_from_texts(monkeypatch, text, kept):
    monkeypatch.setenv("HF_TOKEN", "value of the variable")
    assert CHECK["without_secrets"](text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "train.total_tokens=32000",
        "data.text_key=body",
        "+def f(key: str, tokens: int) -> None:",
        "eos_token_id: 3",
        '+TOKENIZER_JSON = "tokenizer.json"',
        "the secret filter",
        "MASTER_PORT=1234",
    ],
)
def test_text_without_secrets_stays(monkeypatch, text):
    monkeypatch.setenv("MOH_TOKEN", "str")  # too short to be searched for
    assert CHECK["without_secrets"](text) == text


def test_secrets_are_removed_from_a_command_line():
    arguments = ["check.py", "a b.yaml", "deepspeed.comet.api_key=x y", "--hub-token", "abc", "run.seed=3"]
    expected = "check.py 'a b.yaml' 'deepspeed.comet.api_key=[removed]' --hub-token [removed] run.seed=3"
    assert CHECK["shown_command"](arguments) == expected


def test_snapshot_holds_no_secret_of_the_changes_or_the_configuration(tiny, monkeypatch, tmp_path):
    answers = {("diff", "HEAD"): "+HF_TOKEN=s3cret"}
    monkeypatch.setitem(CHECK["snapshot"].__globals__, "_git", lambda *arguments: answers.get(arguments))
    monkeypatch.setattr("sys.argv", ["check.py", "deepspeed.comet.api_key=s3cret"])
    config = tiny({"run.dir": str(tmp_path), "deepspeed.comet": {"api_key": "s3cret"}})
    CHECK["snapshot"](config, tmp_path / "snapshot")
    files = sorted((tmp_path / "snapshot").iterdir())
    assert [file.name for file in files] == ["code.patch", "config.yaml", "job.json"]
    for file in files:
        assert "s3cret" not in file.read_text()
        assert "[removed]" in file.read_text()


def test_run_folder_whose_name_holds_control_characters_is_refused(monkeypatch, tmp_path):
    arguments = ["configs/smoke.yaml", f'run.dir="{tmp_path}/a\\eb"', "--world-size", "2", "--no-data"]
    monkeypatch.setattr("sys.argv", ["check.py", *arguments])
    with pytest.raises(UserError, match=r"^run\.dir must be a path without control characters\. Got .*/a\\x1bb; name"):
        CHECK["main"]()
