"""One training run of the study: a DoD model or a class-only one, by the same loop."""

from dataclasses import dataclass
from pathlib import Path

import torch
from data_sets import DataSet
from diffusers import DPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.training import count_prior_rows, dod_loss, drop_labels, flow_example


# The average's memory is a tenth of the steps so far (EDM2's power function), so that it suits every length of training.
EMA_INV_GAMMA = 10


@dataclass(frozen=True)
class Size:
    """The backbone, on 4x4 tokens whatever the images' size, and the batch that it is trained with."""

    width: int = 128
    heads: int = 4
    layers: int = 4
    batch_size: int = 32
    grid: int = 4


@dataclass(frozen=True)
class Variant:
    """What a run varies.

    Args:
        prior_drop (`float`): share of each batch without a prior; 1 is the class-only rival, which has no embedder.
        bottleneck (pair of `int`): side of the codes' grid, and channels per code.
        embedder_layers (pair of `int`): blocks of the embedder's encoder and decoder.
        code_noise (`float`): noise on the codes in training, in multiples of their root mean square.
        learning_rate (`float`): constant after 50 steps of warm-up.
        extra_layers (`int`): blocks of the transformer beyond those of its size.
    """

    prior_drop: float = 0.5
    bottleneck: tuple[int, int] = (2, 4)
    embedder_layers: tuple[int, int] = (1, 1)
    code_noise: float = 0.0
    learning_rate: float = 2e-3
    extra_layers: int = 0

    @property
    def has_prior(self) -> bool:
        return self.prior_drop < 1


def build_models(data: DataSet, variant: Variant, size: Size) -> tuple[DoDTransformer2DModel, DoDLatentEmbedder]:
    channels, image_size = data.images.shape[1:3]
    patch_size = image_size // size.grid
    if channels * patch_size**2 > size.width:
        raise ValueError(
            f"A token of {channels * patch_size**2} numbers, most of them noise to predict, does not pass through a width of "
            f"{size.width}: take a larger --width or smaller images."
        )
    transformer = DoDTransformer2DModel(
        sample_size=image_size,
        patch_size=patch_size,
        in_channels=channels,
        num_layers=size.layers + variant.extra_layers,
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        num_classes=len(data.class_names),
        prediction_type="flow",
    )
    # With 0.02, made for a million steps, a few thousand do not learn the classes.
    torch.nn.init.normal_(transformer.class_embed.weight, std=1.0)
    bottleneck_grid, bottleneck_dim = variant.bottleneck
    num_encoder_layers, num_decoder_layers = variant.embedder_layers
    latent_embedder = DoDLatentEmbedder(
        sample_size=image_size,
        patch_size=image_size // bottleneck_grid,
        in_channels=channels,
        num_encoder_layers=num_encoder_layers,
        num_decoder_layers=num_decoder_layers,
        num_attention_heads=2,
        attention_head_dim=24,
        bottleneck_dim=bottleneck_dim,
        output_dim=transformer.inner_dim,
        output_patch_size=patch_size,
    )
    return transformer, latent_embedder


def training_step(
    transformer: DoDTransformer2DModel,
    latent_embedder: DoDLatentEmbedder,
    data: DataSet,
    variant: Variant,
    batch_size: int,
) -> torch.Tensor:
    """The loss of a random batch."""
    device = data.images.device
    rows = torch.randint(len(data.images), (batch_size,), device=device)
    images = data.images[rows]
    labels = drop_labels(data.labels[rows], len(data.class_names), 0.1)
    sigmas = compute_density_for_timestep_sampling("logit_normal", batch_size, logit_mean=0.0, logit_std=1.0)
    example = flow_example(images, torch.randn_like(images), sigmas.to(device))
    num_prior_rows = count_prior_rows(batch_size, variant.prior_drop)
    code_noise = None
    if variant.code_noise:
        side, channels = variant.bottleneck
        code_noise = variant.code_noise * torch.randn(batch_size, side**2, channels, device=device)
    return dod_loss(transformer, latent_embedder, images, labels, example, num_prior_rows, code_noise=code_noise).total


def train(data: DataSet, variant: Variant, size: Size, steps: list[int], seed: int, folder: Path) -> None:
    """Trains from scratch and saves a pipeline `folder/step-N` with averaged weights at each N of `steps`."""
    torch.manual_seed(seed)
    transformer, latent_embedder = (model.to(data.images.device) for model in build_models(data, variant, size))
    parameters = [*transformer.parameters()]
    if variant.has_prior:
        parameters += latent_embedder.parameters()
    optimizer = torch.optim.AdamW(
        parameters, lr=variant.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=EMA_INV_GAMMA, power=1.0, foreach=True)
    for model in (transformer, latent_embedder):
        model.compile_repeated_blocks()
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    id2label = dict(enumerate(data.class_names))

    for step in range(1, max(steps) + 1):
        optimizer.param_groups[0]["lr"] = variant.learning_rate * min(step / 50, 1)
        training_step(transformer, latent_embedder, data, variant, size.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if step in steps:
            ema.store(parameters)
            ema.copy_to(parameters)
            pipeline = DoDPipeline(transformer, latent_embedder, scheduler, id2label=id2label)
            pipeline.save_pretrained(folder / f"step-{step}")
            ema.restore(parameters)
