"""The commands that the documents recommend, as processes: their statuses, signals, a launcher that dies, two runs at once."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from training_runs import arguments, write_digits


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
PLAIN = [sys.executable, "-m", "diffusers_dod", "train"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
ENDLESS = ("--max_train_steps", 10**6, "--checkpointing_steps", 10**6)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return ("--train_data_dir", write_digits(tmp_path_factory.mktemp("data")), "--resolution", 14)


def start(command, log, *args) -> subprocess.Popen:
    with open(log, "a") as file:
        return subprocess.Popen([*command, *arguments(*args)], stdout=file, stderr=file, env=ENVIRONMENT)


def wait_for_step(log, process) -> None:
    while not re.search(r"loss=", log.read_text()):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)


def lines_of(log, text) -> list[str]:
    return [line for line in log.read_text().splitlines() if text in line]


def test_bad_input_is_status_2_and_one_line(options, tmp_path):
    process = start(PLAIN, tmp_path / "log", tmp_path / "run", *options, "--resolution", 15)
    assert process.wait() == 2
    lines = (tmp_path / "log").read_text().splitlines()
    (line,) = [line for line in lines if line and "examples/s" not in line]  # beside the bars of reading pictures
    assert line.startswith("diffusers-dod train: error: --resolution 15 must be a multiple of")
    assert not (tmp_path / "run").exists()


def test_too_many_bad_steps_are_status_3_and_one_line(options, tmp_path):
    spikes = ("--learning_rate", 1e30, "--max_skipped_steps", 1, "--max_train_steps", 50, "--max_grad_norm", 0)
    process = start(PLAIN, tmp_path / "log", tmp_path / "run", *options, *spikes)
    assert process.wait() == 3
    (line,) = lines_of(tmp_path / "log", "diffusers-dod train: error:")
    assert "2 updates in a row were skipped" in line and "Traceback" not in (tmp_path / "log").read_text()


def test_one_run_holds_its_folder_until_a_signal_or_a_kill_and_is_resumed(options, tmp_path):
    first = start(PLAIN, tmp_path / "first", tmp_path / "run", *options, *ENDLESS)
    wait_for_step(tmp_path / "first", first)
    second = start(PLAIN, tmp_path / "second", tmp_path / "run", *options, *ENDLESS)
    assert second.wait() == 2
    (line,) = lines_of(tmp_path / "second", "diffusers-dod train: error:")
    assert f"another run trains in {tmp_path / 'run'}" in line

    first.send_signal(signal.SIGTERM)
    assert first.wait() == 143
    (line,) = lines_of(tmp_path / "first", "To resume, repeat the command.")
    step = int(re.search(r"after step (\d+)", line)[1])
    assert (tmp_path / "run" / f"checkpoint-{step}" / "training_config.json").is_file()

    resumed = start(PLAIN, tmp_path / "resumed", tmp_path / "run", *options, *ENDLESS)
    wait_for_step(tmp_path / "resumed", resumed)
    assert f"Resuming from {tmp_path / 'run' / f'checkpoint-{step}'}" in (tmp_path / "resumed").read_text()
    resumed.kill()
    resumed.wait()
    # A kill leaves the folder free as well, and the checkpoint.
    last = start(PLAIN, tmp_path / "last", tmp_path / "run", *options, *ENDLESS, "--max_train_steps", step + 2)
    assert last.wait() == 0
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["step"] == step + 2


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 1), (signal.SIGKILL, 2)])
def test_trainers_whose_launcher_dies_write_a_checkpoint_and_end(number, processes, options, tmp_path):
    command = [*LAUNCH, str(processes), "-m", "diffusers_dod", "train"]
    launcher = start(command, tmp_path / "log", tmp_path / "run", *options, *ENDLESS)
    wait_for_step(tmp_path / "log", launcher)
    launcher.send_signal(number)
    launcher.wait()
    deadline = time.monotonic() + 100
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    with FileLock(tmp_path / "run" / ".lock", timeout=100):
        pass  # nobody is left
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "training_config.json").is_file()
