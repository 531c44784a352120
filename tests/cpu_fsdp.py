"""accelerate's FSDP2 on CPU processes, where it is tested without a GPU."""

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def enable_fsdp_on_cpu(argv: list[str]) -> None:
    """Has accelerate's settings of FSDP hold for CPU processes: it reads them for accelerators only.

    accelerate would pass over `ACCELERATE_USE_FSDP` without a word and train with DDP. Its FSDP2 runs on gloo just as
    well. To be called before the first `Accelerator` of the command that is tested.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        mixed_precision = argv[argv.index("--mixed_precision") + 1] if "--mixed_precision" in argv else None
        state = Accelerator(mixed_precision=mixed_precision).state
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if mixed_precision is not None:
            state.fsdp_plugin.set_mixed_precision(mixed_precision)
        # Every new view of accelerate's state starts from the partial one.
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
