"""Commands that run in several processes."""

import time

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger


logger = get_logger(__name__)


def drain_process_group() -> None:
    """Waits until nothing of a collective is left in any process; call it before gloo's process group ends.

    Else a process can wait for itself for ever (seen with PyTorch 2.13): the group's end joins gloo's threads while it holds
    the interpreter's lock, which such a thread still needs to let go of the last collective's tensors. Sleeping hands the
    lock over.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.barrier()
        time.sleep(0.1)


def end_together(accelerator: Accelerator) -> None:
    """Ends the trackers and the process group; the last call of a command."""
    drain_process_group()
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # each has errors of its own, and the work is done
            logger.warning(f"{tracker.name} could not be finished: {error}")
    accelerator.trackers = []
    accelerator.end_training()
