"""Rows that only a GPU can fill: utilisation (MFU), memory of DoD-XL/2, images per second."""

import itertools
import statistics

import diffusers
import torch
from interleaved import Ratio, compare, seconds
from workloads import inputs, joint_step, make_models

from diffusers_dod import DoDPipeline
from diffusers_dod.training.flops import PEAK_TFLOPS, training_flops


BATCH = 256


def mfu_rows(args) -> dict[str, float]:
    """Training of whole models on latents in memory: bfloat16 autocast, compiled blocks, no checkpointing, fused AdamW.

    A batch of 256 is accumulated from parts of 64 and of 128, which are also the batches of the memory rows.
    """
    if args.device != "cuda":
        return {}
    name = torch.cuda.get_device_name()
    peak = next((1e12 * value for key, value in PEAK_TFLOPS.items() if key in name), None)
    rows = {}
    for size, part in itertools.product(("B", "XL"), (64, 128)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        transformer, embedder = make_models(size, None, "cuda")
        transformer.compile_repeated_blocks(fullgraph=True)
        embedder.compile_repeated_blocks(fullgraph=True)
        step = joint_step(transformer, embedder, part, "cuda", BATCH // part)
        step(), step()
        low, middle, high = statistics.quantiles([BATCH / seconds(step) for _ in range(args.repeats)], n=4)
        flops = training_flops(transformer, embedder, prior_share=0.5)
        model = f"DoD-{size}/2, batch {BATCH} in parts of {part}"
        rows[f"training, images/s, {model}"] = middle
        rows[f"training, useful TFLOP/s, {model}"] = middle * flops / 1e12
        if peak is not None:
            rows[f"training, MFU, {model}"] = middle * flops / peak
            rows[f"training, MFU, {model}, lower quartile"] = low * flops / peak
            rows[f"training, MFU, {model}, upper quartile"] = high * flops / peak
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


def solver_rows(args) -> dict[str, Ratio]:
    """One unguided stage of 30 steps with `train`'s scheduler and a rival of its order, against Euler's method."""
    if args.device != "cuda":
        return {}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    schedulers = {
        "UniPC": diffusers.UniPCMultistepScheduler(**flow),
        "DPM-Solver++": diffusers.DPMSolverMultistepScheduler(**flow),
        "Euler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }
    rows = {}
    for size, batch in (("B", 8), ("XL", 64)):
        torch.cuda.empty_cache()
        transformer, embedder = make_models(size, None, "cuda", torch.bfloat16)
        transformer.compile_repeated_blocks(fullgraph=True)
        pipes = {name: DoDPipeline(transformer, embedder, scheduler) for name, scheduler in schedulers.items()}
        for pipe in pipes.values():
            pipe.set_progress_bar_config(disable=True)

        def sample(name, pipes=pipes, batch=batch):
            pipes[name]([0] * batch, num_stages=1, guidance_scale=1.0, num_inference_steps=30, output_type="latent")

        for name in ("UniPC", "DPM-Solver++"):
            ratio = compare(lambda: sample(name), lambda: sample("Euler"), args.repeats)  # noqa: B023 - run at once
            rows[f"sampling, {name} / Euler, DoD-{size}/2, batch {batch}"] = ratio
    return rows


def graphs_rows(args) -> dict[str, Ratio]:
    """Forwards of small batches, where launching takes longer than computing: the whole model in CUDA graphs, or eager."""
    if args.device != "cuda":
        return {}
    (eager, _), (graphs, _) = (make_models("B", None, "cuda", torch.bfloat16) for _ in range(2))
    graphs.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)

    @torch.no_grad()
    def forward(model, arguments):
        for _ in range(10):
            model(*arguments, return_dict=False)

    rows = {}
    for batch in (1, 8):
        arguments = inputs(batch, "cuda", dtype=torch.bfloat16)
        forward(graphs, arguments)  # the first runs record
        rows[f"forward, CUDA graphs / eager, DoD-B/2, batch {batch}"] = compare(
            lambda: forward(graphs, arguments),  # noqa: B023 - run at once
            lambda: forward(eager, arguments),  # noqa: B023
            args.repeats,
        )
    return rows
