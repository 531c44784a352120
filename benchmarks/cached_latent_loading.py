"""The share of a training step that loading cached latents takes.

Makes a cache of random latents (256x256 images of an f8 VAE, both flips, float16), trains a DoD model on shuffled rows
of it, and compares the time that the loop waits for a batch of latents (reading, collating, moving, drawing from the
posterior) with that of the whole step, in one run:

    python benchmarks/cached_latent_loading.py --preset S --batch_size 8 --steps 5
"""

import argparse
import tempfile
import time

import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel
from diffusers_dod.data.cache import CachedLatents, sample_posterior, select_flip
from diffusers_dod.data.cache_writing import LatentCacheWriter, cache_settings
from diffusers_dod.presets import PRESETS
from diffusers_dod.training import count_prior_rows, dod_loss, drop_labels, flow_example


def write_random_cache(folder: str, count: int, shard_size: int) -> AutoencoderKL:
    """Returns the VAE that the latents are said to be of."""
    levels = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 4}
    vae = AutoencoderKL(**levels, up_block_types=["UpDecoderBlock2D"] * 4)
    names, labels = [f"{row}.png" for row in range(count)], [row % 1000 for row in range(count)]
    settings = cache_settings(vae, 256, names, labels, flips=True, shard_size=shard_size)
    writer, entries = LatentCacheWriter(folder, settings), []
    writer.begin()
    for number in range(writer.num_shards):
        rows = writer.rows(number)
        shape = (len(rows), 2, *settings["latent_shape"])
        tensors = {"mean": torch.randn(shape), "std": torch.rand(shape), "id": torch.tensor(rows)}
        tensors["label"] = torch.tensor([labels[row] for row in rows])
        entries.append(writer.write(number, tensors, [names[row] for row in rows]))
    writer.finish(entries)
    return vae


def measure_loading(
    preset: str, batch_size: int, steps: int, num_workers: int, cached_images: int, shard_size: int, device: str
) -> list[tuple[float, float]]:
    """Seconds of loading and of the whole step, for each step but a first one that warms up."""
    transformer = DoDTransformer2DModel(**PRESETS[preset].transformer).to(device)
    embedder = DoDLatentEmbedder(**PRESETS[preset].latent_embedder).to(device)
    optimizer = torch.optim.AdamW([*transformer.parameters(), *embedder.parameters()], lr=1e-4)

    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_cache(folder, cached_images, shard_size)
        options = {"num_workers": num_workers, "pin_memory": device == "cuda", "drop_last": True}
        batches = iter(DataLoader(CachedLatents(folder), batch_size, shuffle=True, **options))
        for _ in range(steps + 1):
            start = time.perf_counter()
            batch = {name: values.to(device, non_blocking=True) for name, values in next(batches).items()}
            flipped = torch.rand(batch_size, device=device) < 0.5
            mean, std = (select_flip(batch[name], flipped) for name in ("mean", "std"))
            latents = sample_posterior(mean, std, torch.randn(mean.shape, device=device))
            loaded = time.perf_counter()

            example = flow_example(latents, torch.randn_like(latents), torch.rand(batch_size, device=device))
            labels = drop_labels(batch["label"], 1000, 0.1)
            rows = count_prior_rows(batch_size, 0.5)
            dod_loss(transformer, embedder, latents, labels, example, rows).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            pairs.append((loaded - start, time.perf_counter() - start))
    return pairs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="S")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--cached_images", type=int, default=8192)
    parser.add_argument("--shard_size", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    loading, total = (sum(times) for times in zip(*measure_loading(**vars(args))))
    print(
        f"DoD-{args.preset}/2, batch of {args.batch_size}, {args.device}, {args.num_workers} workers: loading "
        f"{1e3 * loading / args.steps:.2f} ms of {1e3 * total / args.steps:.0f} ms per step, {loading / total:.3%}"
    )


if __name__ == "__main__":
    main()
