"""accelerate's FSDP2 on CPU processes."""

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def enable_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Has several CPU processes follow accelerate's FSDP settings, which it reads for accelerators only.

    accelerate would pass over `ACCELERATE_USE_FSDP` without a word and train with DDP. Its FSDP2 runs on gloo just as
    well. To be called before `prepare`.
    """
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Every new view of accelerate's state starts from the partial one.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
