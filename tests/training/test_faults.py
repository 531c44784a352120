"""Faults around a training: logs and pictures that cannot be written, killed workers, sizes that cannot be."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from test_resume import wait_for
from training_runs import arguments, finish, start, write_digits

from diffusers_dod.cli import run
from diffusers_dod.training.__main__ import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ("--train_data_dir", write_digits(tmp_path_factory.mktemp("data")), "--resolution", 14)


def test_logs_that_cannot_be_written_end_and_training_continues(data, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    steps = ("--max_train_steps", 60, "--checkpointing_steps", 1)
    process = start(arguments(folder, *data, *steps, "--report_to", "tensorboard"), log)
    wait_for(process, lambda: (folder / "checkpoint-2").exists())
    shutil.rmtree(folder / "logs")
    assert finish(process) == 0, log.read_text()
    assert log.read_text().count("Logs end at step") == 1 and (folder / "model_index.json").exists()


GRIDS = {
    "a file in the folder's place": lambda samples: samples.write_text("not a folder"),
    "a link to nowhere": lambda samples: samples.symlink_to("nowhere"),
    "a link to itself": lambda samples: samples.symlink_to("samples"),
    "a folder in the picture's place": lambda samples: (samples / "step_1.png").mkdir(parents=True),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_that_cannot_be_written_is_a_warning(data, tmp_path, caplog, name):
    folder = tmp_path / "run"
    folder.mkdir()
    GRIDS[name](folder / "samples")
    assert main(arguments(folder, *data, "--validation_steps", 1)) == 0
    assert sum("step_1.png could not be written" in message for message in caplog.messages) == 1
    assert (folder / "model_index.json").exists()


def test_a_killed_worker_is_one_line(data, tmp_path):
    log = tmp_path / "log"
    options = ("--dataloader_num_workers", 2, "--max_train_steps", 100_000)
    process = start(arguments(tmp_path / "run", *data, *options), log)
    wait_for(process, lambda: log.exists() and "loss=" in log.read_text())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert finish(process) == 1
    text = log.read_text()
    assert "error: " in text.splitlines()[-1] and "worker" in text.splitlines()[-1].lower()
    assert "Traceback" not in text


@pytest.mark.parametrize("option", ["--transformer_config", "--embedder_config"])
@pytest.mark.parametrize("patch_size", ["0", "-1", '"7"', "null", "[7, 7]"])
def test_a_patch_that_cannot_be_is_one_line(data, tmp_path, capsys, option, patch_size):
    argv = arguments(tmp_path / "run", *data)
    argv[argv.index(option) + 1] = f'{{"patch_size": {patch_size}}}'
    assert run(main, "train", argv) == 2
    assert "patch_size is" in capsys.readouterr().err


def test_a_device_without_flops_is_refused(data, tmp_path, capsys):
    assert run(main, "train", arguments(tmp_path / "run", *data, "--peak_tflops", 0)) == 2
    assert "--peak_tflops" in capsys.readouterr().err
