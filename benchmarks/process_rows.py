"""Rows that need processes of their own: peak memory, DDP, and the loading of cached latents beside them."""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from cached_latent_loading import measure_loading
from interleaved import Ratio, compare, seconds
from workloads import backbone_step, inputs, make_models, precision

from diffusers_dod.training import dod_loss, flow_example


def _in_processes(function, *arguments_of_each):
    """Results of processes that nothing else ran in."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(arguments_of_each), mp_context=context) as executor:
        return list(executor.map(function, *zip(*arguments_of_each)))


def _peak_resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _peak_of_a_step(layers: int, batch: int, device: str, checkpointing: bool) -> tuple[int, float]:
    """Bytes that a step of the fresh process adds, and the best of its next three times."""
    transformer, embedder = make_models("B", layers, device)
    latents, timesteps, labels = inputs(batch, device)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
        embedder.enable_gradient_checkpointing()

    def step():
        example = flow_example(latents, torch.randn_like(latents), timesteps / 1000)
        with precision(device):
            loss = dod_loss(transformer, embedder, latents, labels, example, batch // 2).total
        loss.backward()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        added = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
        before = _peak_resident_bytes()
        step()
        added = _peak_resident_bytes() - before
    return added, min(seconds(step) for _ in range(3))


def memory_rows(args) -> dict[str, Ratio | float]:
    """Peak memory and time of a training step with gradient checkpointing against without."""
    measured = [
        _in_processes(_peak_of_a_step, (args.layers, args.batch_size, args.device, checkpointing))[0]
        for checkpointing in (True, False)
    ]
    memory, times = zip(*measured)
    return {
        "train step, checkpointing / without (best of 3)": Ratio.of_pairs([times]),
        "memory that a step adds, checkpointing, MB per image": memory[0] / args.batch_size / 1e6,
        "memory that a step adds, without, MB per image": memory[1] / args.batch_size / 1e6,
    }


def _ddp_step(layers: int, batch: int, repeats: int, rank: int, store: str) -> Ratio:
    """In rank 0: steps of both processes against steps of this one alone, on one thread each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    transformer, _ = make_models("B", layers, "cpu")
    together = backbone_step(torch.nn.parallel.DistributedDataParallel(transformer), batch, "cpu")
    alone = backbone_step(transformer, batch, "cpu")

    def alone_in_the_first():
        if rank == 0:
            alone()
        dist.barrier()

    ratio = compare(together, alone_in_the_first, repeats)
    dist.destroy_process_group()
    return ratio


def ddp_rows(args) -> dict[str, Ratio]:
    """Two CPU processes of one thread with a batch each, against one of them: 1 is perfect scaling."""
    if args.device != "cpu":
        return {}
    batch = max(args.batch_size // 2, 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(args.layers, batch, args.repeats, rank, f"{folder}/store") for rank in range(2)]
        ratio = _in_processes(_ddp_step, *arguments)[0]
    return {f"train step, 2 DDP processes with batch {batch} each / 1 process alone": ratio}


def cached_loading_rows(args) -> dict[str, Ratio]:
    """The wait for a batch of cached latents against the whole training step."""
    size, batch = ("S", 8) if args.device == "cpu" else ("B", args.batch_size)
    pairs = measure_loading(size, batch, 5, num_workers=0, cached_images=4096, shard_size=512, device=args.device)
    return {f"load cached latents / train step, DoD-{size}/2, batch {batch}": Ratio.of_pairs(pairs)}
