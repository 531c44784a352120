"""Rows that only a GPU can fill: utilisation (MFU), memory of DoD-XL/2, images per second."""

import diffusers
import torch
from interleaved import Ratio, compare, seconds
from workloads import joint_step, make_models

from diffusers_dod import DoDPipeline
from diffusers_dod.training.flops import PEAK_TFLOPS, training_flops


MICRO_BATCH, BATCH = 64, 256


def mfu_rows(args) -> dict[str, float]:
    """Training of whole models on latents in memory: bfloat16 autocast, compiled blocks, no checkpointing, fused AdamW.

    A batch of 256 is accumulated from parts of 64, which is also the batch of the memory row.
    """
    if args.device != "cuda":
        return {}
    name = torch.cuda.get_device_name()
    peak = next((1e12 * value for key, value in PEAK_TFLOPS.items() if key in name), None)
    rows = {}
    for size in ("B", "XL"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        transformer, embedder = make_models(size, None, "cuda")
        transformer.compile_repeated_blocks(fullgraph=True)
        embedder.compile_repeated_blocks(fullgraph=True)
        step = joint_step(transformer, embedder, MICRO_BATCH, "cuda", BATCH // MICRO_BATCH)
        step(), step()
        times = sorted(seconds(step) for _ in range(args.repeats))
        rate = BATCH / times[len(times) // 2]
        flops = training_flops(transformer, embedder, prior_share=0.5)
        model = f"DoD-{size}/2, batch {BATCH} in parts of {MICRO_BATCH}"
        rows[f"training, images/s, {model}"] = rate
        rows[f"training, useful TFLOP/s, {model}"] = rate * flops / 1e12
        if peak is not None:
            rows[f"training, MFU, {model}"] = rate * flops / peak
        rows[f"training, peak memory, GiB, {model}"] = torch.cuda.max_memory_allocated() / 2**30
        del transformer, embedder, step
    return rows


def throughput_rows(args) -> dict[str, Ratio | float]:
    """Two stages of 30 steps in bfloat16, guided in their middle half, with compiled blocks against eager ones."""
    if args.device != "cuda":
        return {}
    rows, batch = {}, 64
    for size in ("B", "XL"):
        torch.cuda.empty_cache()

        def sampler(compiled, size=size):
            transformer, embedder = make_models(size, None, "cuda", torch.bfloat16)
            if compiled:
                transformer.compile_repeated_blocks(fullgraph=True)
            pipe = DoDPipeline(transformer, embedder, diffusers.FlowMatchEulerDiscreteScheduler())
            pipe.set_progress_bar_config(disable=True)
            return lambda: pipe([0] * batch, num_stages=2, num_inference_steps=30, output_type="latent")

        ratio = compare(sampler(True), sampler(False), 3)
        rows[f"sampling, compiled blocks / eager, DoD-{size}/2, batch {batch}"] = ratio
        rows[f"sampling, images/s, compiled, DoD-{size}/2"] = batch / ratio.ours
        rows[f"sampling, images/s, eager, DoD-{size}/2"] = batch / ratio.rival
    return rows
