"""accelerate's FSDP2 on CPU processes, and in mixed precision."""

import dataclasses
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
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        # Every new view of accelerate's state starts from the partial one.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def keep_precision_in_fsdp(accelerator: Accelerator) -> None:
    """Has FSDP2 in mixed precision compute what DDP does: autocast alone decides what is computed in low precision.

    accelerate's policy also casts whatever enters or leaves a sharded module, timesteps, targets, rotary tables and losses
    among them, and adds up the gradients of the processes in low precision. To be called before `prepare`.
    """
    if accelerator.distributed_type != DistributedType.FSDP or accelerator.mixed_precision == "no":
        return
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = dataclasses.replace(
        plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
