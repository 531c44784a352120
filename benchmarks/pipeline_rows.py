"""Rows of the pipeline: against bare forwards, import, loading."""

import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import torch
from interleaved import Ratio, compare
from workloads import inputs, make_models

from diffusers_dod import DoDPipeline


def sampling_rows(args) -> dict[str, Ratio | float]:
    """A guided two-stage call against the same number of bare forwards of the same batch."""
    if args.device == "cpu":
        return _sampling_rows(args, "B", args.layers, args.steps)
    # On a GPU a whole model of either size; half the steps that one samples with, which shows more of the rest than all.
    return {
        f"{name}, DoD-{size}/2": row
        for size in ("B", "XL")
        for name, row in _sampling_rows(args, size, None, 15).items()
    }


def _sampling_rows(args, size: str, layers: int | None, steps: int) -> dict[str, Ratio | float]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    transformer, embedder = make_models(size, layers, args.device, dtype)
    if args.device == "cuda":
        transformer.compile_repeated_blocks(fullgraph=True)
        embedder.compile_repeated_blocks(fullgraph=True)
    pipe = DoDPipeline(transformer, embedder, diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    batch = args.batch_size
    latents, timesteps, labels = inputs(2 * batch, args.device, dtype=dtype)
    prior = torch.zeros(2 * batch, 256, transformer.inner_dim, device=args.device, dtype=dtype)
    options = {"num_inference_steps": steps, "guidance_scale": 2.0, "guidance_interval": (0.0, 1.0)}

    def pipeline():
        pipe([0] * batch, num_stages=2, output_type="latent", **options)

    @torch.no_grad()
    def forwards():
        for stage_prior in (None, prior):
            for _ in range(steps):
                transformer(latents, timesteps, labels, encoder_hidden_states=stage_prior)

    @torch.no_grad()
    def forwards_and_embedder():
        forwards()
        embedder(latents[:batch])

    name = f"pipeline, 2 stages of {steps} guided steps / bare forwards"
    rows = {name: compare(pipeline, forwards, args.repeats)}
    if args.device == "cpu":
        rows[f"{name} and one run of the embedder"] = compare(pipeline, forwards_and_embedder, args.repeats)
    return rows


def import_rows(args) -> dict[str, Ratio]:
    """`DoDPipeline` imported after the classes of diffusers that it needs, against importing those."""
    code = (
        "import time; start = time.perf_counter()\n"
        "from diffusers import DDPMScheduler, DiffusionPipeline, FasterCacheConfig, SchedulerMixin\n"
        "from diffusers.image_processor import VaeImageProcessor\n"
        "from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin\n"
        "from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward\n"
        "from diffusers.models.cache_utils import CacheMixin\n"
        "from diffusers.models.modeling_utils import ModelMixin\n"
        "middle = time.perf_counter()\nfrom diffusers_dod import DoDPipeline\nprint(time.perf_counter() - middle, middle - start)"
    )
    pairs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        pairs.append(tuple(float(value) for value in done.stdout.split()))
    return {"import / diffusers' classes": Ratio.of_pairs(pairs)}


def loading_rows(args) -> dict[str, Ratio]:
    """`DoDPipeline.from_pretrained` of a folder against reading the bytes of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = DoDPipeline(*make_models("B", args.layers, "cpu"), diffusers.FlowMatchEulerDiscreteScheduler())
        pipe.save_pretrained(folder)
        diffusers.utils.logging.disable_progress_bar()
        files = list(Path(folder).rglob("*.safetensors"))

        def read():
            for file in files:
                file.read_bytes()

        return {
            "load a pipeline folder / read its weights": compare(
                lambda: DoDPipeline.from_pretrained(folder), read, args.repeats
            )
        }
