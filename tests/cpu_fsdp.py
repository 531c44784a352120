"""accelerate's FSDP2 on CPU processes."""

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def enable_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Has several CPU processes follow accelerate's FSDP settings, which it reads for accelerators only.

    accelerate would pass over `ACCELERATE_USE_FSDP` without a word and train with DDP. Its FSDP2 runs on gloo just as
    well. To be called before `prepare`.

    Raises:
        NotImplementedError: where FSDP is asked for and this PyTorch's FSDP2 knows no CPU (2.6 does not).
    """
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and accelerator.distributed_type == DistributedType.MULTI_CPU:
        if not hasattr(torch.cpu.Stream, "record_event"):
            raise NotImplementedError(f"PyTorch {torch.__version__} has no FSDP2 on CPUs: take a newer one, or DDP")
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Every new view of accelerate's state starts from the partial one.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
