"""Trackers that fail, each in its own way, end the logs and nothing else."""

import PIL.Image
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from training_runs import arguments, write_digits

from diffusers_dod.processes import end_together
from diffusers_dod.training.__main__ import main
from diffusers_dod.training.tracking import log_image, log_values


class CommError(Exception):
    """W&B's, for instance, is no OSError."""


class Broken(GeneralTracker):
    """A tracker as a user would write one, whose service is gone."""

    name, requires_logging_directory, main_process_only = "broken", False, False

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def fail(self, *args, **kwargs):
        self.calls += 1
        raise self.error

    tracker = property(lambda self: None)
    store_init_configuration = log = log_images = finish = fail


ERRORS = [OSError(28, "No space left on device"), CommError("run deleted"), ConnectionError("reset\nby peer")]
ERRORS += [RuntimeError("the process has died"), ValueError("a key is no string"), BrokenPipeError(32, "Broken pipe")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_tracker_raises_is_one_warning(error, caplog):
    for write in (
        lambda accelerator: log_values(accelerator, {"loss": 1.0}, 3),
        lambda accelerator: log_image(accelerator, "samples", PIL.Image.new("L", (2, 2)), 3),
    ):
        caplog.clear()
        tracker = Broken(error)
        accelerator = Accelerator(log_with=[tracker])
        accelerator.trackers = [tracker]
        write(accelerator)
        write(accelerator)
        assert tracker.calls == 1 and accelerator.trackers == []
        (message,) = caplog.messages
        assert "Logs end at step 3, they could not be written: " in message and "\n" not in message
    # And at the end, when the result is there already
    accelerator.trackers = [tracker]
    end_together(accelerator)
    assert "broken could not be finished" in caplog.messages[-1]


@pytest.mark.parametrize("rate", [1e20, 1e35])
def test_a_grid_of_a_model_that_diverged_is_a_warning(rate, tmp_path, caplog):
    data = ("--train_data_dir", write_digits(tmp_path / "data"), "--resolution", 14)
    options = ("--learning_rate", rate, "--validation_steps", 1, "--no-ema", "--max_train_steps", 3)
    assert main(arguments(tmp_path / "run", *data, *options)) == 0
    assert any("Samples or metrics" in message and "Training continues" in message for message in caplog.messages)
    assert (tmp_path / "run" / "checkpoint-3").exists()
