"""The study's models, and what they draw."""

import torch
from data_sets import DataSet
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler
from experiments import CODE_RECIPE, Setting, Size, Variant
from options import PresenceTransformer, QuantisedEmbedder
from training import Recipe, Training

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.training.codes import nearest, set_statistics


def build_scheduler(solver: str) -> SchedulerMixin:
    if solver == "UniPC":
        return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return FlowMatchEulerDiscreteScheduler()


def build_transformer(
    channels: int,
    size: int,
    patch: int,
    width: int,
    layers: int,
    classes: int,
    x_prediction: bool,
    transformer_class: type[DoDTransformer2DModel] = DoDTransformer2DModel,
) -> DoDTransformer2DModel:
    transformer = transformer_class(
        sample_size=size,
        patch_size=patch,
        in_channels=channels,
        num_layers=layers,
        num_attention_heads=width // 32,
        attention_head_dim=32,
        num_classes=classes,
        prediction_type="flow",
        x_prediction=x_prediction,
    )
    # With 0.02, made for a million steps, a few thousand do not learn the classes.
    torch.nn.init.normal_(transformer.class_embed.weight, std=1.0)
    return transformer


def begin_training(data: DataSet, variant: Variant, size: Size, steps: int, seed: int) -> Training:
    """A run of backbone and embedder."""
    torch.manual_seed(seed)
    channels, side = data.images.shape[1:3]
    patch, classes = side // variant.tokens, len(data.class_names)
    transformer_class = PresenceTransformer if variant.option == "presence" else DoDTransformer2DModel
    transformer = build_transformer(
        channels, side, patch, size.width, size.layers, classes, x_prediction=True, transformer_class=transformer_class
    )
    grid, bottleneck_dim = variant.bottleneck
    embedder_class = QuantisedEmbedder if variant.option == "quantised" else DoDLatentEmbedder
    embedder = embedder_class(
        sample_size=side,
        patch_size=side // grid,
        in_channels=channels,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        attention_head_dim=24,
        bottleneck_dim=bottleneck_dim,
        output_dim=size.width,
        output_patch_size=patch,
        noise_level_input=variant.reads_noise_level,
    )
    recipe = Recipe(**{**vars(variant.recipe), "steps": steps})
    has_prior = recipe.prior_drop < 1
    training = Training(transformer, embedder if has_prior else None, data.images, data.labels, recipe, seed)
    training.unused_embedder = None if has_prior else embedder.to(data.images.device)
    return training


@torch.no_grad()
def encode(embedder: DoDLatentEmbedder, images: torch.Tensor) -> torch.Tensor:
    """Normalised codes of images, `(number, channels, rows, columns)`."""
    codes = torch.cat([embedder.encode(batch) for batch in images.split(2000)])
    if embedder.config.codes_mean is None:
        set_statistics(embedder, codes)
    return embedder.normalize_codes(codes, *images.shape[-2:])


def begin_code_training(training: Training, variant: Variant, seed: int) -> Training:
    """A run of the code model on the codes of a finished run's training images: the whole grid is one token."""
    torch.manual_seed(seed)
    codes = encode(training.embedder, training.images)
    width, layers = variant.code_size
    classes = training.transformer.config.num_classes
    model = build_transformer(
        codes.shape[1], codes.shape[2], codes.shape[2], width, layers, classes, x_prediction=False
    )
    recipe = Recipe(**{**vars(CODE_RECIPE), "steps": variant.code_steps})
    return Training(model, None, codes, training.labels, recipe, seed)


def build_pipeline(data: DataSet, training: Training, code_training: Training | None) -> DoDPipeline:
    pipeline = DoDPipeline(
        training.transformer,
        training.embedder or training.unused_embedder,
        build_scheduler("UniPC"),
        id2label=dict(enumerate(data.class_names)),
        code_transformer=None if code_training is None else code_training.transformer,
        code_scheduler=None if code_training is None else build_scheduler("UniPC"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_labels(data: DataSet, number: int) -> torch.Tensor:
    """Classes as often as the training images have them, mixed evenly: `(number,)`."""
    shares = torch.bincount(data.labels.cpu()) * number / len(data.labels)
    counts = shares.long()
    counts[(shares - counts).argsort(descending=True)[: number - int(counts.sum())]] += 1
    places = torch.cat([torch.arange(count) / max(count, 1) for count in counts])
    return torch.arange(len(counts)).repeat_interleave(counts)[places.argsort(stable=True)].to(data.labels.device)


@torch.no_grad()
def real_codes(pipe: DoDPipeline, labels: torch.Tensor, data: DataSet, seed: int) -> torch.Tensor:
    """Codes of random training images of these classes."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)
    chosen = torch.empty(len(labels), dtype=torch.long, device=labels.device)
    for label in labels.unique():
        places, of_class = (labels == label).nonzero()[:, 0], order[data.labels[order] == label]
        chosen[places] = of_class[torch.arange(len(places), device=labels.device) % len(of_class)]
    return pipe.latent_embedder.encode(data.images[chosen])


def draw(pipe: DoDPipeline, setting: Setting, labels: torch.Tensor, data: DataSet, seed: int) -> torch.Tensor:
    """Images of the last stage, `(labels, channels, size, size)` in [-1, 1]."""
    pipe.scheduler, pipe.code_scheduler = build_scheduler(setting.solver), build_scheduler(setting.solver)
    options = {"prior_source": "stage"}
    if setting.source == "codes":
        options = {"prior_source": "codes"}
    elif setting.source == "real":
        options = {"codes": real_codes(pipe, labels, data, seed)}
    output = pipe(
        labels,
        num_stages=len(setting.steps),
        num_inference_steps=list(setting.steps),
        guidance_scale=list(setting.guidance),
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        code_noise_level=setting.noise_level,
        **options,
    )
    return output.images.clamp(-1, 1)


@torch.no_grad()
def copying(
    pipe: DoDPipeline, labels: torch.Tensor, images: torch.Tensor, data: DataSet, seed: int
) -> dict[str, float]:
    """Medians of the distance to the nearest training code and image, of generated and of held-out ones."""
    size = images.shape[-1]
    codes = pipe.generate_codes(labels, size, size, generator=torch.Generator().manual_seed(seed))
    codes = pipe.latent_embedder.normalize_codes(codes, size, size)
    training = encode(pipe.latent_embedder, data.images)
    rows = torch.randperm(len(data.held_out_images), generator=torch.Generator().manual_seed(0))[: len(labels)]
    held_out = data.held_out_images[rows.to(data.labels.device)]
    pixels = images[0].numel() ** 0.5
    return {
        "code": float(nearest(codes, training)[0].median()),
        "code_held_out": float(nearest(encode(pipe.latent_embedder, held_out), training)[0].median()),
        "image": float(nearest(images, data.images)[0].median()) / pixels,
        "image_held_out": float(nearest(held_out, data.images)[0].median()) / pixels,
    }
