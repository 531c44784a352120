"""accelerate's FSDP2 on CPU processes, where it is tested without a GPU."""

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def enable_fsdp_on_cpu() -> None:
    """Has accelerate's settings of FSDP hold for CPU processes: it reads them for accelerators only.

    accelerate would pass over `ACCELERATE_USE_FSDP` without a word and train with DDP. Its FSDP2 runs on gloo just as
    well. To be called before the first `Accelerator` of the command that is tested.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        state = Accelerator().state
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Every new view of accelerate's state starts from the partial one.
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
