"""Speed against named rivals, every row a ratio measured in this run: `make bench`, or `python benchmarks/bench.py`.

On a CPU the models have their full width and a reduced depth (`--layers`). Rows:

    train step, forward     DoD-B/2 against diffusers' DiTTransformer2DModel of the same width and depth, which has the same
                            multiply-accumulates on tokens
    pipeline                a guided two-stage call against the same number of bare forwards of the same batch
    embedder                a run of the latent embedder against the guided steps of the stage that it opens
    import                  `import diffusers_dod` after the classes of diffusers that it needs, against importing those
    load                    `DoDPipeline.from_pretrained` of a folder against reading the bytes of its weights
    checkpointing           peak memory and time of a training step with gradient checkpointing against without
    batch, tokens           a forward of twice the batch, or of twice the tokens, against twice a forward

Prints a table and writes JSON.
"""

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import diffusers
import torch
from interleaved import Ratio, compare, seconds

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.presets import PRESETS
from diffusers_dod.training import count_prior_rows, dod_loss, flow_example


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_models(layers: int) -> tuple[DoDTransformer2DModel, DoDLatentEmbedder]:
    preset = PRESETS["B"]
    torch.manual_seed(0)
    transformer = DoDTransformer2DModel(**{**preset.transformer, "num_layers": layers})
    return transformer.to(DEVICE), DoDLatentEmbedder(**preset.latent_embedder).to(DEVICE)


def make_dit(layers: int) -> diffusers.DiTTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=12, attention_head_dim=64, out_channels=4, sample_size=32
    ).to(DEVICE)


def inputs(batch: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = torch.randn(batch, 4, side, side, device=DEVICE)
    return latents, torch.full((batch,), 500.0, device=DEVICE), torch.zeros(batch, dtype=torch.long, device=DEVICE)


def bench_training(layers: int, batch: int, repeats: int) -> dict[str, Ratio]:
    """DoD's step holds its embedder on half of the rows; DiT's is the plain one of its size."""
    transformer, embedder = make_models(layers)
    dit = make_dit(layers)
    latents, timesteps, labels = inputs(batch)
    noise = torch.randn_like(latents)

    def optimizer(*models):
        return torch.optim.AdamW([p for model in models for p in model.parameters()], lr=1e-4, fused=True)

    ours, rival = optimizer(transformer, embedder), optimizer(dit)

    def our_step():
        example = flow_example(latents, noise, timesteps / 1000)
        rows = count_prior_rows(batch, 0.5)
        dod_loss(transformer, embedder, latents, labels, example, rows).total.backward()
        ours.step(), ours.zero_grad()

    def backbone_step():
        prediction = transformer(latents, timesteps, labels).sample
        (prediction - noise).square().mean().backward()
        ours.step(), ours.zero_grad()

    def their_step():
        prediction = dit(latents, timesteps.long(), class_labels=labels).sample
        (prediction - noise).square().mean().backward()
        rival.step(), rival.zero_grad()

    rows = {
        "train step, embedder included / DiT's": compare(our_step, their_step, repeats),
        "train step, backbone alone / DiT's": compare(backbone_step, their_step, repeats),
    }
    with torch.no_grad():
        rows["forward / DiT's"] = compare(
            lambda: transformer(latents, timesteps, labels),
            lambda: dit(latents, timesteps.long(), class_labels=labels),
            repeats,
        )
    return rows


def bench_sampling(layers: int, batch: int, steps: int, repeats: int) -> dict[str, Ratio]:
    transformer, embedder = make_models(layers)
    pipe = DoDPipeline(transformer, embedder, diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    latents, timesteps, labels = inputs(2 * batch)
    prior = torch.zeros(2 * batch, 256, transformer.inner_dim, device=DEVICE)
    options = {"num_inference_steps": steps, "guidance_scale": 2.0, "guidance_interval": (0.0, 1.0)}

    def pipeline():
        pipe([0] * batch, num_stages=2, output_type="latent", **options)

    @torch.no_grad()
    def forwards():
        for stage_prior in (None, prior):
            for _ in range(steps):
                transformer(latents, timesteps, labels, encoder_hidden_states=stage_prior)

    @torch.no_grad()
    def embed():
        embedder(latents[:batch])

    @torch.no_grad()
    def stage():
        for _ in range(steps):
            transformer(latents, timesteps, labels, encoder_hidden_states=prior)

    return {
        f"pipeline, 2 stages of {steps} guided steps / bare forwards": compare(pipeline, forwards, repeats),
        f"embedder / {steps} guided steps of {layers} blocks": compare(embed, stage, repeats),
    }


def bench_import(repeats: int) -> dict[str, Ratio]:
    code = (
        "import time; start = time.perf_counter()\n"
        "from diffusers import DDPMScheduler, DiffusionPipeline, FasterCacheConfig, SchedulerMixin\n"
        "from diffusers.image_processor import VaeImageProcessor\n"
        "from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin\n"
        "from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward\n"
        "from diffusers.models.cache_utils import CacheMixin\n"
        "from diffusers.models.modeling_utils import ModelMixin\n"
        "middle = time.perf_counter()\nimport diffusers_dod\nprint(time.perf_counter() - middle, middle - start)"
    )
    times = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append([float(value) for value in done.stdout.split()])
    ours, theirs = (sorted(values)[len(values) // 2] for values in zip(*times))
    ratios = sorted(mine / other for mine, other in times)
    return {"import / diffusers' classes": Ratio(ours, theirs, ratios[len(ratios) // 2], ratios[0], ratios[-1])}


def bench_loading(layers: int, repeats: int) -> dict[str, Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        pipe = DoDPipeline(*make_models(layers), diffusers.FlowMatchEulerDiscreteScheduler())
        pipe.save_pretrained(folder)
        files = list(Path(folder).rglob("*.safetensors"))

        def read():
            for file in files:
                file.read_bytes()

        return {
            "load a pipeline folder / read its weights": compare(
                lambda: DoDPipeline.from_pretrained(folder), read, repeats
            )
        }


def _peak_resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _peak_of_a_step(layers: int, batch: int, checkpointing: bool) -> tuple[int, float]:
    """In a process of its own, whose peak nothing else has touched: bytes that the step adds, and its seconds."""
    transformer, embedder = make_models(layers)
    latents, timesteps, labels = inputs(batch)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
        embedder.enable_gradient_checkpointing()

    def step():
        example = flow_example(latents, torch.randn_like(latents), timesteps / 1000)
        dod_loss(transformer, embedder, latents, labels, example, batch // 2).total.backward()

    if DEVICE.type == "cuda":
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


def bench_memory(layers: int, batch: int) -> tuple[dict[str, Ratio], dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    measured = {}
    for checkpointing in (True, False):
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            measured[checkpointing] = executor.submit(_peak_of_a_step, layers, batch, checkpointing).result()
    memory, times = ([measured[True][i], measured[False][i]] for i in (0, 1))
    rows = {"time of a step, checkpointing / without (1 run)": Ratio(*times, *[times[0] / times[1]] * 3)}
    megabytes = {"with checkpointing": memory[0] / batch / 1e6, "without": memory[1] / batch / 1e6}
    return rows, megabytes


@torch.no_grad()
def bench_scaling(layers: int, batch: int, repeats: int) -> dict[str, Ratio]:
    transformer, _ = make_models(layers)
    one, twice, tall = inputs(batch), inputs(2 * batch), inputs(batch)
    tall = (torch.randn(batch, 4, 64, 32, device=DEVICE), *tall[1:])

    def forward(arguments, times=1):
        return lambda: [transformer(*arguments) for _ in range(times)]

    return {
        f"forward, batch {2 * batch} / twice batch {batch}": compare(forward(twice), forward(one, 2), repeats),
        "forward, 512 tokens / twice 256 tokens": compare(forward(tall), forward(one, 2), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=15 if DEVICE.type == "cuda" else 3, help="blocks of the models")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of a stage")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="benchmarks/results.json")
    args = parser.parse_args()

    rows = bench_training(args.layers, args.batch_size, args.repeats)
    rows |= bench_sampling(args.layers, args.batch_size, args.steps, args.repeats)
    rows |= bench_import(5) | bench_loading(args.layers, args.repeats)
    memory_rows, megabytes = bench_memory(args.layers, args.batch_size)
    rows |= memory_rows | bench_scaling(args.layers, args.batch_size, args.repeats)

    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    setting = {**vars(args), "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print("| ours / rival | ratio | quartiles | ours, ms | rival, ms |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row.ratio:.3f} | {row.low:.3f}-{row.high:.3f} | {1e3 * row.ours:.1f} | {1e3 * row.rival:.1f} |"
        )
    print("\nPeak memory that a training step adds, MB an image:", megabytes)
    report = {
        "setting": setting,
        "rows": {k: row._asdict() for k, row in rows.items()},
        "megabytes_an_image": megabytes,
    }
    Path(args.output).write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
