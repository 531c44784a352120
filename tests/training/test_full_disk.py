"""A disk without space at five moments of a run: nothing finished is lost, and the same command goes on when there is room.

The disk is a small one in memory, in a namespace of its own; a file that fills it comes and goes.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from test_resume import OPTIONS, steps_saved, wait_for
from training_runs import arguments, assert_equal_tensors, finish, start, weights, write_digits

from diffusers_dod import DoDPipeline
from diffusers_dod.training.checkpoints import what_is_damaged


STEPS = 12
MOMENTS = ["first checkpoint", "later checkpoint", "logs and grid", "last checkpoint", "pipeline"]


class Disk:
    """Four megabytes that can be filled to the last byte."""

    def __init__(self, folder: Path):
        folder.mkdir()
        command = f"mount -t tmpfs -o size=4m none {folder} && echo mounted && exec sleep 1000"
        self.holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", command], stdout=subprocess.PIPE, text=True
        )
        if self.holder.stdout.readline() != "mounted\n":
            pytest.skip("no disk can be mounted here: unshare needs user namespaces")
        self.path = Path(f"/proc/{self.holder.pid}/root{folder}")

    def fill(self, free: int = 0) -> None:
        """Leaves so many bytes."""
        with open(self.path / "filler", "wb", buffering=0) as file:
            file.write(bytes(shutil.disk_usage(self.path).free - free))

    def empty(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("no disk can be mounted here: there is no unshare")
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.holder.kill()
    disk.holder.wait()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing disturbed, and its options."""
    folder = tmp_path_factory.mktemp("unbroken")
    options = ("--train_data_dir", write_digits(folder / "digits", counts=(5, 3, 3)), *OPTIONS)
    options += ("--max_train_steps", STEPS)
    assert finish(start(arguments(folder / "run", *options), folder / "log")) == 0, (folder / "log").read_text()
    return folder / "run", options


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_loses_nothing_finished(disk, unbroken, tmp_path, moment):
    unbroken_dir, options = unbroken
    run, log = disk.path / "run", tmp_path / "log"
    command = arguments(run, *options)
    if moment == "logs and grid":
        command = arguments(run, *options, "--report_to", "tensorboard", "--validation_steps", 3)
    if moment == "last checkpoint":
        command += ["--checkpointing_steps", "1000"]
    if moment == "pipeline":  # a run that was killed when its last checkpoint was whole
        shutil.copytree(unbroken_dir / f"checkpoint-{STEPS}", run / f"checkpoint-{STEPS}")
    if moment in ("first checkpoint", "pipeline"):
        disk.fill(free=40_000)  # for the configuration

    process = start(command, log)
    if moment == "later checkpoint":
        wait_for(process, lambda: steps_saved(run) >= 2)
    elif moment in ("logs and grid", "last checkpoint"):
        # The bar at 0, once all that comes before the steps is written: their logs must still fail.
        wait_for(process, lambda: log.exists() and f" 0/{STEPS} " in log.read_text())
    if not (disk.path / "filler").exists():
        disk.fill()
    status, text = finish(process), log.read_text()

    # One line says it, whole checkpoints stay whole, and there is no half of a pipeline.
    assert status == 1 and "diffusers-dod train: error: " in text.splitlines()[-1], text
    if moment == "logs and grid":  # a thread of TensorBoard's own prints what ended it
        assert "Logs end at step" in text and "samples/step_12.png could not be written" in text
    else:
        assert "Traceback" not in text, text
    kept = sorted(run.glob("checkpoint-*"))
    assert all(what_is_damaged(checkpoint) is None for checkpoint in kept)
    assert kept or moment not in ("later checkpoint", "pipeline")
    assert not (run / "model_index.json").exists()
    if moment in ("first checkpoint", "later checkpoint"):
        assert "Training continues" in text

    disk.empty()
    assert finish(start(command, log)) == 0, log.read_text()
    assert ("Resuming from" in log.read_text()) == bool(kept)
    assert_equal_tensors(weights(run), weights(unbroken_dir))
    assert json.loads((run / "training_config.json").read_text())["step"] == STEPS
    assert DoDPipeline.from_pretrained(str(run)).transformer is not None
