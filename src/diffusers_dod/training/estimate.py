"""What a run will take, known before its first step: memory of each device, and time. Neither is measured here.

Memory is counted: weights, gradients, moments, averages, and what the forward pass keeps for the backward pass, in numbers per
token, layer and width. `benchmarks/predictions.py` counts the same by running the step on fake tensors, and
`tests/training/test_estimate.py` holds the two against each other and against a real step.
"""

import argparse
import time
from typing import NamedTuple

import psutil
import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin

from ..cli import BadInput
from .build import Subject, peak_flops
from .flops import training_flops


# Numbers that a block keeps per token and channel, beside its feed-forward's; and what surrounds the blocks
TRANSFORMER_KEEPS, EMBEDDER_KEEPS, AROUND = 14.1, 10.2, 3.0
# Of the peak, in training: compiled blocks of DoD-XL/2 reach 0.35 on an H100 (benchmarks/NOTES.md), eager ones half of that.
COMPILED_MFU, EAGER_MFU = 0.35, 0.17
# Of what a large matrix product reaches on the CPU
CPU_SHARE = 0.3
# The compiled step of DoD-XL/2 takes 0.85 of what is counted here, so less than this is refused.
SURE = 0.8


class Plan(NamedTuple):
    """What a run will take.

    Args:
        parameters (`dict` of `str` to `int`): of each model.
        memory (`int`): bytes of a device at the peak of a step, the autoencoder's and the images' aside.
        available (`int`): bytes that the device has.
        flops_per_step (`float`): of a global batch, forward and backward.
        peak (`float`, *optional*): FLOP/s of a device, where known; the MFU's.
        seconds_per_step (`float`): at the assumed share of the peak.
    """

    parameters: dict[str, int]
    memory: int
    available: int
    flops_per_step: float
    peak: float | None
    seconds_per_step: float

    def __str__(self) -> str:
        models = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in self.parameters.items())
        memory = f"about {gib(self.memory)} of {gib(self.available)} GiB"
        return f"Parameters: {models}. Memory: {memory}. Time: about {self.seconds_per_step:.2g} s per step"


def gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def kept_numbers(config: dict, is_transformer: bool, tokens: int, checkpointing: bool) -> float:
    """Numbers of activations that a sample's forward pass keeps for its backward pass."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if is_transformer:
        layers, around = config["num_layers"], AROUND
        keeps = TRANSFORMER_KEEPS + (2 if config["activation_fn"] != "swiglu" else 4 * 2 / 3) * config["mlp_ratio"]
    else:
        layers, around = config["num_encoder_layers"] + config["num_decoder_layers"], 2 * AROUND
        keeps = EMBEDDER_KEEPS + 4 * 2 / 3 * config["mlp_ratio"]
    # With checkpointing a block keeps its input, and the one whose backward pass runs all of it.
    return tokens * width * (around + (layers + keeps if checkpointing else layers * keeps))


def step_memory(
    models: dict[str, ModelMixin],
    batch_size: int,
    prior_share: float = 0.5,
    mixed_precision: str | None = None,
    checkpointing: bool = False,
    num_averages: int = 1,
    accumulates: bool = False,
    eight_bit: bool = False,
) -> int:
    """Bytes at the peak of a training step, without an autoencoder.

    Args:
        models (`dict`): a transformer or a code model by its name, and a latent embedder as `latent_embedder`; what does not
            require gradients counts as frozen.
        batch_size (`int`): rows of one forward pass.
        prior_share (`float`): share of them that the embedder reads.
        mixed_precision (`str`, *optional*): `"bf16"` or `"fp16"`.
        checkpointing (`bool`): whether blocks are computed again in the backward pass.
        num_averages (`int`): averages of the weights.
        accumulates (`bool`): whether gradients of an earlier part of the batch lie there in the forward pass.
        eight_bit (`bool`): whether the optimizer's moments take a byte each.
    """
    is_mixed = mixed_precision in ("bf16", "fp16")
    trained = sum(p.numel() for model in models.values() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for model in models.values() for p in model.parameters())
    activations = 0.0
    for name, model in models.items():
        config = dict(model.config)
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        is_transformer = name != "latent_embedder"
        rows = batch_size if is_transformer else batch_size * prior_share
        tokens = height * width // config["patch_size"] ** 2
        activations += rows * kept_numbers(config, is_transformer, tokens, checkpointing)
    activations *= 2 if is_mixed else 4
    if is_mixed and not checkpointing:
        activations += 2 * total  # autocast's copies of the weights, which the backward pass needs
    fixed = 4 * total + (2 if eight_bit else 8) * trained + 4 * num_averages * trained
    gradients = 4 * trained
    # A foreach optimizer works on a copy of the gradients' size.
    update = gradients + (0 if eight_bit else 4 * trained)
    return int(fixed + max(update, activations + (gradients if accumulates else 0)))


def device_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes of a GPU; on a CPU the memory that is free now, shared by the processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available // processes


def cpu_flops(size: int = 512, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest of some float32 matrix products on this CPU; others may have waited for a busy core."""
    matrix = torch.ones(size, size)
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def make_plan(args: argparse.Namespace, accelerator: Accelerator, subject: Subject, images_per_step: int) -> Plan:
    """What the run of these options will take; models must be frozen already where they will be.

    Raises:
        BadInput: if it cannot fit the device, with the numbers and the cures.
    """
    models, denoiser = subject.models, subject.models[subject.denoiser]
    prior_share = 1 - args.prior_drop
    counted = {
        "batch_size": args.train_batch_size,
        "prior_share": prior_share,
        "mixed_precision": args.mixed_precision,
        "num_averages": len(args.ema_decay) if args.ema else 0,
        "accumulates": args.gradient_accumulation_steps > 1,
        "eight_bit": args.optimizer == "adamw_8bit",
    }
    memory = step_memory(models, checkpointing=args.gradient_checkpointing, **counted)
    weights = 4 * sum(p.numel() for model in models.values() for p in model.parameters())
    processes, device = accelerator.num_processes, accelerator.device
    available = device_memory(device, processes) + (0 if device.type == "cuda" else weights)  # which are there already
    is_sharded = accelerator.distributed_type in ("FSDP", "DEEPSPEED")
    if SURE * memory > available and not is_sharded:
        refuse(args, subject, memory, available, step_memory(models, checkpointing=True, **counted))

    flops = images_per_step * training_flops(denoiser, models.get("latent_embedder"), prior_share)
    peak = peak_flops(args, accelerator)
    if peak is not None:
        rate = peak * (COMPILED_MFU if args.compile else EAGER_MFU) * processes
    else:
        rate = cpu_flops() * CPU_SHARE * processes
    parameters = {name.replace("_", " "): sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return Plan(parameters, memory, available, flops, peak, flops / rate)


def refuse(args: argparse.Namespace, subject: Subject, memory: int, available: int, checkpointed: int) -> None:
    count = sum(p.numel() for model in subject.models.values() for p in model.parameters()) / 1e6
    size = "--preset" if subject.denoiser == "transformer" else "--code_preset"
    cures = [f"a smaller {size}", "a smaller --train_batch_size with more --gradient_accumulation_steps"]
    if not args.gradient_checkpointing and subject.denoiser == "transformer":
        cures.insert(0, f"--gradient_checkpointing ({gib(checkpointed)} GiB)")
    if not subject.data.are_latents and subject.pipeline.vae is None:
        cures.append("the latents of an autoencoder, which are fewer tokens (`diffusers-dod cache`, --latents_dir)")
    raise BadInput(
        f"a step of {count:.0f} million parameters on {args.train_batch_size} images of {args.resolution} pixels takes about "
        f"{gib(memory)} GiB, but there are {gib(available)}: take {', '.join(cures[:-1])} or {cures[-1]}"
    )


def announce(accelerator: Accelerator, plan: Plan, steps: int) -> None:
    """One line of what the run will take."""
    hours = plan.seconds_per_step * steps / 3600
    duration = f"{60 * hours:.2g} min" if hours < 2 else f"{hours:.2g} h" if hours < 48 else f"{hours / 24:.3g} days"
    accelerator.print(f"{plan}, {duration} for {steps:,} steps.")
