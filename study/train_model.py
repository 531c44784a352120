"""One training run of the study: a DoD model or a class-only one, by the same loop."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from data_sets import DataSet
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.training.objective import count_prior_rows, dod_loss, drop_labels, flow_example


# The average's memory is a tenth of the steps so far (EDM2's power function), so that it suits every length of training.
EMA_INV_GAMMA = 10

# Redrawn priors: when in a run the images are redrawn, how many of them for each step of the run, and in how many steps.
REDRAW_AT = (0.25, 0.5, 0.75)
REDRAWN_PER_STEP = 0.5
REDRAW_STEPS = 4
REDRAW_BATCH = 100


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
        bottleneck (pair of `int`): side of the codes' grid, and channels of a code.
        embedder_layers (pair of `int`): blocks of the embedder's encoder and decoder.
        code_noise (`float`): noise on the codes in training, in multiples of their root mean square.
        input_noise (`float`): the embedder reads `(1 - s) x + s noise`, s uniform up to this, in training.
        own_prior (`float`):
            share of the rows with a prior whose embedder reads the model's own one-step sample from much noise.
        learning_rate (`float`): constant after 50 steps of warm-up.
        extra_layers (`int`): blocks that the transformer has more than its size says.
        prior_start (`float`): share of the training before which no row has a prior.
        noise_price (`float`):
            in the loss, for a nat that the codes can carry; `code_noise` is learned then, a size for each channel.
        code_matching (`float`):
            in the loss, for the distance of the codes of the model's own one-step samples from their images' codes.
        redrawn_prior (`float`):
            share of the rows with a prior whose embedder reads their image redrawn by the model ([`redraw`]), from a
            quarter of the training on.
        redraw_sigmas (pair of `float`): how much noise an image is redrawn from, least and most.
    """

    prior_drop: float = 0.5
    bottleneck: tuple[int, int] = (2, 4)
    embedder_layers: tuple[int, int] = (1, 1)
    code_noise: float = 0.0
    input_noise: float = 0.0
    own_prior: float = 0.0
    learning_rate: float = 2e-3
    extra_layers: int = 0
    prior_start: float = 0.0
    noise_price: float = 0.0
    code_matching: float = 0.0
    redrawn_prior: float = 0.0
    redraw_sigmas: tuple[float, float] = (0.7, 1.0)

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


@torch.no_grad()
def one_step_samples(transformer: DoDTransformer2DModel, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What stage 1 makes of images of which noise has left little (sigma 0.6 to 1), in one step."""
    sigmas = 0.6 + 0.4 * torch.rand(len(images), device=images.device)
    example = flow_example(images, torch.randn_like(images), sigmas)
    velocity = transformer(example.noisy, example.timesteps, labels, return_dict=False)[0]
    return (example.noisy - sigmas.view(-1, 1, 1, 1) * velocity).clamp(-1, 1)


class Redrawn(NamedTuple):
    """Images as the model draws them itself: `rows` of the data `(number,)`, and what became of them."""

    rows: torch.Tensor
    images: torch.Tensor


@torch.no_grad()
def redraw(
    transformer: DoDTransformer2DModel, data: DataSet, rows: torch.Tensor, sigmas: tuple[float, float]
) -> Redrawn:
    """Noises images and lets stage 1 denoise them again (SDEdit, Meng et al. 2021, arXiv 2108.01073).

    Such a picture has the layout of its image and the mistakes of stage 1: what the embedder reads in sampling, with
    the image that it should have been. The first rows get the least noise.

    Args:
        transformer ([`DoDTransformer2DModel`]): of prediction type `"flow"`.
        data (`DataSet`): has the images and their classes.
        rows (`torch.Tensor`): `(number,)`, which of them.
        sigmas (pair of `float`): least and most noise.
    """
    scheduler = FlowMatchEulerDiscreteScheduler()
    batches = rows.split(REDRAW_BATCH)
    redrawn = []
    for batch, sigma in zip(batches, torch.linspace(*sigmas, len(batches)).tolist()):
        scheduler.set_timesteps(
            sigmas=[sigma * (1 - step / REDRAW_STEPS) for step in range(REDRAW_STEPS)], device=rows.device
        )
        images = data.images[batch]
        images = scheduler.scale_noise(images, scheduler.timesteps[:1], torch.randn_like(images))
        for timestep in scheduler.timesteps:
            velocity = transformer(images, timestep.expand(len(batch)), data.labels[batch], return_dict=False)[0]
            images = scheduler.step(velocity, timestep, images, return_dict=False)[0]
        redrawn.append(images.clamp(-1, 1))
    return Redrawn(rows, torch.cat(redrawn))


def code_capacity(log_noise: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Nats that codes of power 1 can carry past noise of such sizes: that many Gaussian channels."""
    return num_codes * torch.log1p(torch.exp(-2 * log_noise)).sum() / 2


def training_step(
    transformer: DoDTransformer2DModel,
    latent_embedder: DoDLatentEmbedder,
    data: DataSet,
    variant: Variant,
    batch_size: int,
    log_noise: torch.Tensor | None = None,
    redrawn: Redrawn | None = None,
) -> torch.Tensor:
    """The loss of a random batch.

    `log_noise`, of the codes' channels, stands for `variant.code_noise` where that is learned. `redrawn` are the images
    that the first rows are drawn from, as many as `variant` says.
    """
    device = data.images.device
    rows = torch.randint(len(data.images), (batch_size,), device=device)
    if redrawn is not None:
        number = round(variant.redrawn_prior * (1 - variant.prior_drop) * batch_size)
        choice = torch.randint(len(redrawn.rows), (number,), device=device)
        rows[:number] = redrawn.rows[choice]
    images = data.images[rows]
    labels = drop_labels(data.labels[rows], len(data.class_names), 0.1)
    sigmas = compute_density_for_timestep_sampling("logit_normal", batch_size, logit_mean=0.0, logit_std=1.0)
    example = flow_example(images, torch.randn_like(images), sigmas.to(device))
    num_prior_rows = count_prior_rows(batch_size, variant.prior_drop)

    # What the embedder reads, and noise at its bottleneck
    seen = images
    if variant.input_noise:
        strength = variant.input_noise * torch.rand(batch_size, 1, 1, 1, device=device)
        seen = (1 - strength) * images + strength * torch.randn_like(images)
    if variant.own_prior:
        count = round(variant.own_prior * num_prior_rows)
        seen = torch.cat([one_step_samples(transformer, images[:count], labels[:count]), images[count:]])
    if redrawn is not None:
        seen = torch.cat([redrawn.images[choice], images[number:]])
    code_noise = None
    if variant.code_noise:
        config = latent_embedder.config
        num_codes = (images.shape[-1] // config.patch_size) ** 2
        size = variant.code_noise if log_noise is None else log_noise.exp()
        code_noise = size * torch.randn(batch_size, num_codes, config.bottleneck_dim, device=device)
    loss = dod_loss(transformer, latent_embedder, seen, labels, example, num_prior_rows, code_noise=code_noise).total

    # What else the codes are asked for
    if log_noise is not None:
        loss = loss + variant.noise_price * code_capacity(log_noise, num_codes)
    if variant.code_matching:
        own = one_step_samples(transformer, images[:num_prior_rows], labels[:num_prior_rows])
        with torch.no_grad():
            wanted = latent_embedder(images[:num_prior_rows]).codes
        loss = loss + variant.code_matching * F.mse_loss(latent_embedder(own).codes, wanted) / wanted.square().mean()
    return loss


def train(data: DataSet, variant: Variant, size: Size, steps: list[int], seed: int, folder: Path) -> None:
    """Trains from scratch and saves a pipeline `folder/step-N` with averaged weights at each N of `steps`."""
    torch.manual_seed(seed)
    transformer, latent_embedder = (model.to(data.images.device) for model in build_models(data, variant, size))
    parameters = [*transformer.parameters()]
    if variant.has_prior:
        parameters += latent_embedder.parameters()
    log_noise = None
    if variant.noise_price:
        start = torch.full((latent_embedder.config.bottleneck_dim,), math.log(variant.code_noise))
        log_noise = torch.nn.Parameter(start.to(data.images.device))
        parameters.append(log_noise)
    optimizer = torch.optim.AdamW(
        parameters, lr=variant.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=EMA_INV_GAMMA, power=1.0, foreach=True)
    for model in (transformer, latent_embedder):
        model.compile_repeated_blocks()
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    id2label = dict(enumerate(data.class_names))

    redrawn, redraw_at = None, [round(share * max(steps)) for share in REDRAW_AT]

    for step in range(1, max(steps) + 1):
        if variant.redrawn_prior and step in redraw_at:
            ema.store(parameters)
            ema.copy_to(parameters)
            rows = torch.randperm(len(data.images), device=data.images.device)
            number = round(REDRAWN_PER_STEP * max(steps))
            redrawn = redraw(transformer, data, rows[:number], variant.redraw_sigmas)
            ema.restore(parameters)
        optimizer.param_groups[0]["lr"] = variant.learning_rate * min(step / 50, 1)
        now = variant if step > variant.prior_start * max(steps) else replace(variant, prior_drop=1.0)
        training_step(transformer, latent_embedder, data, now, size.batch_size, log_noise, redrawn).backward()
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
