"""What accompanies a training without being able to end it: the trackers' logs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..cli import first_line


logger = get_logger(__name__)


@contextmanager
def _or_no_more(accelerator: Accelerator, step: int) -> Iterator[None]:
    """After a failed write there are no trackers any more."""
    try:
        yield
    except Exception as error:  # a full disk, a network, a service: each tracker has errors of its own
        accelerator.trackers = []
        logger.warning(f"Logs end at step {step}, they could not be written: {first_line(error)}. Training continues.")


def log_values(accelerator: Accelerator, values: dict[str, Any], step: int) -> None:
    """Gives the trackers the values of a step."""
    with _or_no_more(accelerator, step):
        accelerator.log(values, step=step)


def log_image(accelerator: Accelerator, name: str, image: PIL.Image.Image, step: int) -> None:
    """Gives the trackers a picture."""
    with _or_no_more(accelerator, step):
        for tracker in accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.array(image)[None]}, step=step, **options)
