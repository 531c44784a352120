"""Models, inputs and training steps that the rows of the benchmark share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import diffusers
import torch

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel
from diffusers_dod.presets import PRESETS
from diffusers_dod.training import count_prior_rows, dod_loss, flow_example
from diffusers_dod.training.flops import transformer_flops


def make_models(
    size: str, layers: int | None, device: str, dtype: torch.dtype = torch.float32
) -> tuple[DoDTransformer2DModel, DoDLatentEmbedder]:
    """A preset with another number of blocks in the transformer; `None` is its own."""
    preset = PRESETS[size]
    depth = {} if layers is None else {"num_layers": layers}
    torch.manual_seed(0)
    with torch.device(device):
        transformer = DoDTransformer2DModel(**{**preset.transformer, **depth})
        embedder = DoDLatentEmbedder(**preset.latent_embedder)
    if dtype != torch.float32:
        transformer.to(dtype), embedder.to(dtype)
    return transformer, embedder


def make_dit(layers: int, device: str) -> diffusers.DiTTransformer2DModel:
    """DiT of DoD-B's width: its blocks have the multiply-accumulates of DoD's."""
    torch.manual_seed(0)
    with torch.device(device):
        return diffusers.DiTTransformer2DModel(
            num_layers=layers, num_attention_heads=12, attention_head_dim=64, out_channels=4, sample_size=32
        )


def compile_blocks(*models: torch.nn.Module) -> None:
    """What one does on a GPU, for DiT too, whose class has no `compile_repeated_blocks`."""
    for model in models:
        for name in ("transformer_blocks", "encoder_blocks", "decoder_blocks"):
            for block in getattr(model, name, ()):
                block.compile()


def full_depth_factor(size: str, model: DoDTransformer2DModel) -> float:
    """Operations of the preset over those of a model with fewer blocks."""
    with torch.device("meta"):
        full = DoDTransformer2DModel(**PRESETS[size].transformer)
    return transformer_flops(full) / transformer_flops(model)


def inputs(
    batch: int, device: str, height: int = 32, width: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and labels."""
    latents = torch.randn(batch, 4, height, width, device=device, dtype=dtype)
    return latents, torch.full((batch,), 500.0, device=device), torch.arange(batch, device=device) % 1000


def precision(device: str) -> AbstractContextManager:
    """What one trains in: bfloat16 autocast on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def make_optimizer(*models: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for model in models for p in model.parameters()], lr=1e-4, fused=True)


def backbone_step(
    model: torch.nn.Module, batch: int, device: str, autocast: AbstractContextManager | None = None, **size: int
) -> Callable[[], None]:
    """A training step of a DoD transformer or of DiT without an embedder: forward, backward, fused AdamW."""
    latents, timesteps, labels = inputs(batch, device, **size)
    if isinstance(model, diffusers.DiTTransformer2DModel):
        timesteps = timesteps.long()
    noise, optimizer = torch.randn_like(latents), make_optimizer(model)
    autocast = precision(device) if autocast is None else autocast

    def step() -> None:
        with autocast:
            prediction = model(latents, timestep=timesteps, class_labels=labels, return_dict=False)[0]
        (prediction.float() - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def joint_step(
    transformer: torch.nn.Module, embedder: torch.nn.Module, batch: int, device: str, parts: int = 1
) -> Callable[[], None]:
    """DoD's training step, with the embedder on half of the rows; `parts` of `batch` rows are accumulated."""
    latents, timesteps, labels = inputs(batch, device)
    optimizer = make_optimizer(transformer, embedder)

    def step() -> None:
        for _ in range(parts):
            example = flow_example(latents, torch.randn_like(latents), timesteps / 1000)
            with precision(device):
                loss = dod_loss(transformer, embedder, latents, labels, example, count_prior_rows(batch, 0.5)).total
            (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
