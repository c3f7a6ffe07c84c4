from pathlib import Path

from moh_megatron.config.paths import checkpoint_dir, data_dir


def test_paths_are_below_the_run_folder(configure):
    config = configure()
    assert data_dir(config) == Path("runs/x/data")
    assert checkpoint_dir(config) == Path("runs/x/checkpoints")


def test_data_folder_may_be_outside_the_run_folder(configure):
    assert data_dir(configure({"data.dir": "/datasets/pile"})) == Path("/datasets/pile")
