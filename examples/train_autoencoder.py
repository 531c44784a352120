"""Trains a small `AutoencoderKL` of diffusers on images of one size, for a latent DoD model of one's own data.

    python study/write_images.py characters --output_dir data/characters
    python examples/train_autoencoder.py --train_data_dir data/characters/train --held_out data/characters/held_out \
        --output_dir outputs/characters-vae

`output_dir` is what `diffusers-dod cache` and `diffusers-dod train` take as `--vae_name_or_path`. It also receives
`reconstruction.json` and `reconstructions.png`: held-out images (rows 1 and 3), each above its reconstruction.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_from_disk
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


PROCESSOR = VaeImageProcessor(do_resize=False, do_convert_rgb=True)
COLUMNS = 12  # of the picture of reconstructions


def collate(rows: list[dict]) -> torch.Tensor:
    """Images `(batch, 3, height, width)` in [-1, 1]."""
    return PROCESSOR.preprocess([row["image"] for row in rows])


def load_images(folder: Path, batch_size: int, shuffle: bool) -> DataLoader:
    rows = load_from_disk(folder)
    drop_last = shuffle and len(rows) >= batch_size  # else a small folder would have no batch at all
    return DataLoader(rows, batch_size, shuffle=shuffle, drop_last=drop_last, collate_fn=collate)


def build_autoencoder(latent_channels: int) -> AutoencoderKL:
    """Eight pixels to a latent, and little work at full resolution."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        latent_channels=latent_channels,
        norm_num_groups=8,
    )


class Objective(torch.nn.Module):
    """Absolute error of the reconstruction, and the divergence from a normal distribution per latent number.

    A module, so that several processes share its gradients.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        return (decoded - images).abs().mean(), posterior.kl().mean() / posterior.mean[0].numel()


@torch.no_grad()
def measure(vae: AutoencoderKL, loader: DataLoader, batches: int) -> tuple[dict[str, float], list]:
    """Errors on held-out images, the latents' spread, and pictures of the first images beside their reconstructions."""
    errors, latents, pictures = [], [], []
    for images in itertools.islice(loader, batches):
        images = images.to(vae.device)
        mean = vae.encode(images).latent_dist.mode()
        decoded = vae.decode(mean).sample.clamp(-1, 1)
        errors.append((decoded - images).flatten(1))
        latents.append(mean)
        if not pictures:
            columns = min(COLUMNS, len(images) // 2)
            for row in (0, columns):
                for part in (images, decoded):
                    pictures += PROCESSOR.postprocess(part[row : row + columns].cpu(), output_type="pil")
    error = torch.cat(errors) / 2  # of pixels in [0, 1]
    figures = {
        "images": len(error),
        "psnr": float(-10 * error.square().mean(dim=1).log10().mean()),
        "mean_absolute_error": float(error.abs().mean()),
        "latent_std": float(torch.cat(latents).std()),
    }
    return figures, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, required=True, help="a folder of `datasets.save_to_disk`")
    parser.add_argument("--held_out", type=Path, required=True, help="another one, to measure on")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=3e-4, help="of the divergence per latent number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    accelerator = Accelerator()

    # 1. Model, data and optimizer
    vae = build_autoencoder(args.latent_channels)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.max_train_steps // 30, args.max_train_steps)
    ema = EMAModel(vae.parameters(), decay=0.999, foreach=True)
    loader = load_images(args.train_data_dir, args.train_batch_size, shuffle=True)
    objective, optimizer, loader = accelerator.prepare(Objective(vae), optimizer, loader)
    ema.to(accelerator.device)

    # 2. Training
    epochs = math.ceil(args.max_train_steps / len(loader))
    batches = itertools.chain.from_iterable(loader for _ in range(epochs))
    progress_bar = tqdm(total=args.max_train_steps, ncols=80, disable=not accelerator.is_main_process, mininterval=5)
    for images in itertools.islice(batches, args.max_train_steps):
        error, divergence = objective(images)
        accelerator.backward(error + args.kl_weight * divergence)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(vae.parameters())
        progress_bar.update()
        if progress_bar.n % 50 == 0:
            progress_bar.set_postfix(error=f"{error.item():.4f}", kl=f"{divergence.item():.2f}")
    progress_bar.close()

    # 3. Reconstructions of held-out images, and the scale that makes latents of unit variance
    if accelerator.is_main_process:
        ema.copy_to(vae.parameters())
        vae.eval()
        figures, pictures = measure(vae, load_images(args.held_out, 100, shuffle=True), batches=10)
        vae.register_to_config(scaling_factor=1 / figures["latent_std"])
        vae.save_pretrained(args.output_dir)
        Path(args.output_dir, "reconstruction.json").write_text(json.dumps(figures, indent=1) + "\n")
        if pictures:  # not of a single image
            make_image_grid(pictures, rows=4, cols=len(pictures) // 4).save(args.output_dir / "reconstructions.png")
        print(f"PSNR {figures['psnr']:.1f} dB on {figures['images']} held-out images; saved to {args.output_dir}")


if __name__ == "__main__":
    main()
