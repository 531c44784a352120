"""What accompanies a training without being able to end it: the trackers' logs."""

from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from ..cli import first_line


logger = get_logger(__name__)


def log_values(accelerator: Accelerator, values: dict[str, Any], step: int) -> None:
    """Gives the trackers the values of a step; after a failed write, such as to a full disk, there are none any more."""
    try:
        accelerator.log(values, step=step)
    except OSError as error:
        accelerator.trackers = []
        logger.warning(f"Logs end at step {step}, they could not be written: {first_line(error)}. Training continues.")
