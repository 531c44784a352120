"""Ending several processes without a deadlock."""

import time

import torch.distributed as dist


def drain_process_group() -> None:
    """Waits for all processes, and until nothing of a collective is left; call it before the process group goes.

    Else a process can wait for itself for ever (seen with PyTorch 2.13 and gloo): the group's end joins gloo's threads while
    it holds the interpreter's lock, which such a thread still needs to let go of the last collective's tensors. Sleeping
    hands the lock over.
    """
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.1)
