"""Predicted memory of a training step, for the table of docs/training.md: `python benchmarks/predictions.py`.

The table is of `diffusers_dod.training.estimate`, which counts weights, gradients, AdamW's moments, an average and what the
forward pass keeps. `--simulate` runs the same steps on PyTorch's fake tensors, which have shapes, types and lifetimes but no
numbers, and adds up the bytes that live at a time; nothing is computed, no GPU is needed, and a cell takes seconds. What CUDA
itself, the allocator and kernels' workspaces take comes on top; compiled blocks keep less.
"""

import argparse
import weakref
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel
from diffusers_dod.presets import PRESETS
from diffusers_dod.training import dod_loss, flow_example
from diffusers_dod.training.averaging import WeightAverages
from diffusers_dod.training.estimate import step_memory


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made within it and live: `now`, and the most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(output):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, key, size)
        return output


def train_steps(
    transformer_config: dict,
    embedder_config: dict,
    batch_size: int,
    mixed_precision: str | None = None,
    checkpointing: bool = False,
    parts: int = 1,
    averages: int = 1,
    steps: int = 2,
) -> int:
    """Bytes at the peak of the last of some steps, half of whose rows see a prior; on fake tensors within `FakeTensorMode`."""
    with LiveBytes() as live:
        models = DoDTransformer2DModel(**transformer_config), DoDLatentEmbedder(**embedder_config)
        transformer, embedder = models
        for model in models:
            if checkpointing:
                model.enable_gradient_checkpointing()
        parameters = {f"{i}.{name}": p for i, model in enumerate(models) for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(parameters.values(), foreach=True)
        ema = WeightAverages(parameters, [0.999 - 0.1 * i for i in range(averages)])
        size, channels = transformer.config.sample_size, transformer.config.in_channels
        for _ in range(steps):
            live.peak = live.now
            for _ in range(parts):
                latents, labels = (
                    torch.randn(batch_size, channels, size, size),
                    torch.zeros(batch_size, dtype=torch.long),
                )
                example = flow_example(latents, torch.randn_like(latents), torch.rand(batch_size))
                is_mixed = mixed_precision is not None
                with torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext():
                    loss = dod_loss(transformer, embedder, latents, labels, example, batch_size // 2).total
                loss.backward()
                del loss, example, latents
            optimizer.step()
            ema.step()
            optimizer.zero_grad()
    return live.peak


def simulate(preset: str, batch_size: int, **options) -> int:
    """The same of a preset, on latents of 32x32x4."""
    configs = PRESETS[preset]
    with FakeTensorMode():
        return train_steps(configs.transformer, configs.latent_embedder, batch_size, **options)


def predict(preset: str, batch_size: int, **options) -> int:
    configs = PRESETS[preset]
    with torch.device("meta"):
        transformer = DoDTransformer2DModel(**configs.transformer)
        embedder = DoDLatentEmbedder(**configs.latent_embedder)
    return step_memory({"transformer": transformer, "latent_embedder": embedder}, batch_size, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["S", "B", "L", "XL"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--simulate", action="store_true", help="run the steps on fake tensors instead of counting")
    args = parser.parse_args()
    count = simulate if args.simulate else predict
    print("| GiB | " + " | ".join(f"batch {size}" for size in args.batch_sizes) + " |")
    print("|---|" + "---|" * len(args.batch_sizes))
    for preset in args.presets:
        for checkpointing in (False, True):
            options = {"mixed_precision": "bf16", "checkpointing": checkpointing}
            cells = [f"{count(preset, size, **options) / 2**30:.3g}" for size in args.batch_sizes]
            print(f"| {preset}{', checkpointing' if checkpointing else ''} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
