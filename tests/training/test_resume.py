"""Runs that are killed, stopped or out of disk space, and the same command again."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time

import pytest
import torch
from training_runs import NAMES, arguments, assert_equal_tensors, cache_digits, finish, start, weights, write_digits

from diffusers_dod import DoDPipeline


# CI kills each kind of run ten times: `DOD_KILLS=20 python -m pytest --timeout 0 tests/training/test_resume.py -k killed` does more.
KILLS = int(os.environ.get("DOD_KILLS", 10))
STEPS = max(48, 8 * KILLS)
OPTIONS = ("--resolution", 14, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--random_flip")
OPTIONS += ("--lr_scheduler", "cosine", "--learning_rate", 1e-3, "--ema_decay", 0.9, 0.99, "--checkpointing_steps", 2)
OPTIONS += ("--class_drop", 0.3, "--prior_drop", 0.3, "--max_train_steps", STEPS)
DATA = {"images": (), "stream": ("--streaming", "--shuffle_buffer_size", 5), "latents": ()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data"), counts=(5, 3, 3))


@pytest.fixture(scope="module", params=DATA)
def unbroken(request, digits, tmp_path_factory):
    """A run that nothing disturbed, and its options."""
    folder = tmp_path_factory.mktemp("unbroken")
    data = ("--train_data_dir", digits)
    if request.param == "latents":
        data = ("--latents_dir", cache_digits(digits, folder, "--flips"))
    options = (*data, *OPTIONS, *DATA[request.param])
    assert finish(start(arguments(folder / "run", *options), folder / "log")) == 0, (folder / "log").read_text()
    return folder / "run", options


def steps_saved(output_dir) -> int:
    """The step of the last whole checkpoint."""
    return max((int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")), default=0)


def wait_for(process, condition) -> None:
    while not condition():
        assert process.is_alive(), "the run has ended before it could be disturbed"
        time.sleep(0.0005)


def assert_same_end(output_dir, unbroken_dir):
    names = [*NAMES, *(f"{name}_ema_{decay}" for name in NAMES for decay in (0.9, 0.99))]
    last = f"checkpoint-{STEPS}"
    assert_equal_tensors(weights(output_dir), weights(unbroken_dir))
    assert_equal_tensors(weights(output_dir / last, *names), weights(unbroken_dir / last, *names))
    moments = [
        torch.load(run / last / "optimizer.bin", weights_only=True)["state"] for run in (output_dir, unbroken_dir)
    ]
    assert moments[0].keys() == moments[1].keys() and moments[0]
    for index, state in moments[0].items():
        assert_equal_tensors(state, moments[1][index])


def test_a_run_killed_many_times_ends_bit_equal_to_one_never_killed(unbroken, tmp_path):
    unbroken_dir, options = unbroken
    chance = random.Random(0)
    command, log = arguments(tmp_path / "run", *options, "--checkpoints_total_limit", 2), tmp_path / "log"
    while_writing = 0
    for kill in range(KILLS):
        process = start(command, log)
        enough = steps_saved(tmp_path / "run") + 2 * chance.randrange(3)
        wait_for(process, lambda: steps_saved(tmp_path / "run") >= enough)  # noqa: B023
        if kill % 2:
            wait_for(process, lambda: list((tmp_path / "run").glob("tmp-checkpoint-*/*")))
            time.sleep(chance.uniform(0, 0.02))
        else:
            time.sleep(chance.uniform(0, 0.1))
        process.kill()
        assert finish(process) == -signal.SIGKILL
        while_writing += len(list((tmp_path / "run").glob("tmp-checkpoint-*"))) > 0
    assert while_writing > 0 and 0 < steps_saved(tmp_path / "run") < STEPS
    assert finish(start(command, log)) == 0
    assert "Resuming from" in log.read_text()
    assert_same_end(tmp_path / "run", unbroken_dir)
    assert len(list((tmp_path / "run").glob("*checkpoint-*"))) == 2


@pytest.mark.parametrize(
    "unbroken, number", [("images", signal.SIGTERM), ("stream", signal.SIGINT)], indirect=["unbroken"]
)
def test_a_signal_writes_a_checkpoint_first_and_the_same_command_goes_on(unbroken, tmp_path, number):
    unbroken_dir, options = unbroken
    command, log = arguments(tmp_path / "run", *options, "--checkpointing_steps", 1000), tmp_path / "log"
    process = start(command, log)
    wait_for(process, lambda: log.exists() and re.search(rf" [1-9]\d*/{STEPS} ", log.read_text()))
    os.kill(process.pid, number)
    assert finish(process) == 128 + number
    step = steps_saved(tmp_path / "run")
    assert 0 < step < STEPS
    assert f"Stopped by {number.name} after step {step}" in log.read_text()
    assert not (tmp_path / "run" / "model_index.json").exists()
    assert finish(start(command, log)) == 0
    assert_same_end(tmp_path / "run", unbroken_dir)


@pytest.mark.parametrize("unbroken", ["images"], indirect=True)
def test_a_finished_run_says_so_and_goes_on_when_told_to_train_longer(unbroken, tmp_path):
    unbroken_dir, options = unbroken
    run = tmp_path / "run"
    shutil.copytree(unbroken_dir, run)
    before = (run / "transformer" / "diffusion_pytorch_model.safetensors").stat()
    assert finish(start(arguments(run, *options), tmp_path / "log")) == 0
    assert f"is finished: it holds the pipeline of step {STEPS}" in (tmp_path / "log").read_text()
    assert (run / "transformer" / "diffusion_pytorch_model.safetensors").stat() == before
    # Killed after the last checkpoint, before the pipeline was in place
    (run / "training_config.json").write_text("{}")
    shutil.rmtree(run / "transformer")
    assert finish(start(arguments(run, *options), tmp_path / "log")) == 0
    assert_same_end(run, unbroken_dir)
    assert DoDPipeline.from_pretrained(run).transformer is not None
    longer = arguments(run, *options, "--max_train_steps", STEPS + 2)
    assert finish(start(longer, tmp_path / "log")) == 0
    assert steps_saved(run) == STEPS + 2
    assert json.loads((run / "training_config.json").read_text())["step"] == STEPS + 2


@pytest.mark.parametrize("unbroken", ["images"], indirect=True)
def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(unbroken, tmp_path):
    unbroken_dir, options = unbroken
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(arguments(run, *options, "--checkpoints_total_limit", 1), log)
    wait_for(process, lambda: steps_saved(run) >= 4)
    # No file can grow past this from now on, which stands for a disk without space; optimizer.bin is larger.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    wait_for(process, lambda: "Training continues" in log.read_text())
    good = steps_saved(run)
    line = next(line for line in log.read_text().splitlines() if "could not be written" in line)
    assert f"the last good one is {run}/checkpoint-{good}" in line
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{good}"]
    process.kill()
    finish(process)
    # From that checkpoint, with room again
    assert finish(start(arguments(run, *options), log)) == 0
    assert f"Resuming from {run}/checkpoint-{good}." in log.read_text()
    assert_same_end(run, unbroken_dir)


@pytest.mark.parametrize("unbroken", ["images"], indirect=True)
def test_a_disk_full_at_the_end_is_one_line_and_a_status(unbroken, tmp_path):
    _, options = unbroken
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(arguments(run, *options, "--checkpointing_steps", 1000), log)
    wait_for(process, lambda: log.exists() and re.search(rf" [1-9]\d*/{STEPS} ", log.read_text()))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    assert finish(process) == 1
    lines = log.read_text().splitlines()
    assert "diffusers-dod train: error: " in lines[-1] and "could not be written" in lines[-1]
    assert list(run.glob("*checkpoint-*")) == []
