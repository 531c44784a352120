"""The training objective of DoD and its pieces, for any training loop.

Data flows as: latents and noise -> `flow_example` or `ddpm_example` -> `dod_loss`, which reads the prior off the clean
latents of the first rows and leaves the other rows without one. One batch thus trains stage 1 and the later stages.

    labels = drop_labels(labels, num_classes, probability=0.1)
    sigmas = compute_density_for_timestep_sampling("logit_normal", len(latents), logit_mean=0.0, logit_std=1.0)
    example = flow_example(latents, torch.randn_like(latents), sigmas)
    loss = dod_loss(transformer, latent_embedder, latents, labels, example, count_prior_rows(len(latents), 0.5))
    loss.total.backward()
"""

from typing import NamedTuple

import torch
import torch.nn as nn
from diffusers import DDPMScheduler

from ..arguments import check_count, check_instance, check_rows, check_shares, shown


class DiffusionExample(NamedTuple):
    """A batch to denoise: `noisy` and `target` are `(batch, channels, height, width)`, `timesteps` is `(batch,)`."""

    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor


class DoDLoss(NamedTuple):
    """
    Args:
        total (`torch.Tensor`): mean over the batch, to be differentiated.
        with_prior (`torch.Tensor`): mean over the first `num_prior_rows` rows, detached; NaN if there are none.
        without_prior (`torch.Tensor`): mean over the other rows, detached; NaN if there are none.
        per_sample (`torch.Tensor`): `(batch,)`, each row's weighted error, detached, the rows with a prior first.
        hidden_states (`torch.Tensor`, *optional*): the transformer's, `(batch, tokens, width)`, if a layer was given.
    """

    total: torch.Tensor
    with_prior: torch.Tensor
    without_prior: torch.Tensor
    per_sample: torch.Tensor
    hidden_states: torch.Tensor | None = None


def drop_labels(
    class_labels: torch.Tensor,
    num_classes: int,
    probability: float,
    draws: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turns each label into the null class `num_classes` with `probability`, for classifier-free guidance.

    Args:
        class_labels (`torch.Tensor`): `(batch,)` of integers.
        num_classes (`int`): the model's classes.
        probability (`float`): in [0, 1].
        draws (`torch.Tensor`, *optional*): `(batch,)`, uniform in [0, 1); drawn here by default.

    Raises:
        ValueError: for invalid arguments.
    """
    check_rows((None,), integers=True, class_labels=class_labels)
    check_count("num_classes", num_classes, least=0)
    check_shares(probability=probability)
    if draws is not None:
        check_rows(tuple(class_labels.shape), draws=draws)
    if draws is None:
        draws = torch.rand(class_labels.shape, device=class_labels.device)
    return torch.where(draws < probability, num_classes, class_labels)


def count_prior_rows(batch_size: int, prior_drop: float, generator: torch.Generator | None = None) -> int:
    """How many rows of a batch see a prior: `batch_size * (1 - prior_drop)`, rounded at random where it is not whole.

    A count instead of a coin for each row spares the embedder the rows that would drop its output and keeps shapes
    constant under `torch.compile`. The rows of a shuffled batch are exchangeable, so the first ones serve.

    Args:
        batch_size (`int`): rows of the batch.
        prior_drop (`float`): share of rows without a prior, in [0, 1].
        generator (`torch.Generator`, *optional*): a CPU generator.

    Raises:
        ValueError, TypeError: for invalid arguments.
    """
    check_count("batch_size", batch_size)
    check_shares(prior_drop=prior_drop)
    check_instance("generator", generator, torch.Generator, type(None))
    expected = batch_size * (1 - prior_drop)
    count = int(expected)
    return count + int(torch.rand((), generator=generator).item() < expected - count)


def flow_example(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> DiffusionExample:
    """Flow matching on the linear path, in diffusers' convention.

    `noisy = (1 - sigma) * latents + sigma * noise`, `target = noise - latents`, `timestep = 1000 * sigma`.

    Args:
        latents (`torch.Tensor`): `(batch, channels, height, width)`.
        noise (`torch.Tensor`): standard normal, of the same shape.
        sigmas (`torch.Tensor`): `(batch,)` in [0, 1], 1 is noise.

    Raises:
        ValueError: for tensors of other shapes or types.
    """
    check_rows((None,) * 4, latents=latents)
    check_rows(tuple(latents.shape), noise=noise)
    check_rows((len(latents),), sigmas=sigmas)
    sigma = sigmas.to(latents.dtype).view(-1, 1, 1, 1)
    return DiffusionExample((1 - sigma) * latents + sigma * noise, 1000 * sigmas, noise - latents)


def ddpm_example(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, noise_scheduler: DDPMScheduler
) -> DiffusionExample:
    """The noising of `noise_scheduler`, with the target of its `prediction_type`.

    Args:
        latents (`torch.Tensor`): `(batch, channels, height, width)`.
        noise (`torch.Tensor`): standard normal, of the same shape.
        timesteps (`torch.Tensor`): `(batch,)` of integers below `num_train_timesteps`.
        noise_scheduler (`DDPMScheduler`): of prediction type `"epsilon"`, `"v_prediction"` or `"sample"`.

    Raises:
        ValueError, TypeError: for tensors of other shapes or types, and for another scheduler.
    """
    check_rows((None,) * 4, latents=latents)
    check_rows(tuple(latents.shape), noise=noise)
    check_rows((len(latents),), integers=True, timesteps=timesteps)
    check_instance("noise_scheduler", noise_scheduler, DDPMScheduler)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = latents
    return DiffusionExample(noisy, timesteps, target)


def dod_loss(
    transformer: nn.Module,
    latent_embedder: nn.Module | None,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    example: DiffusionExample,
    num_prior_rows: int,
    weighting: torch.Tensor | None = None,
    code_noise: torch.Tensor | None = None,
    hidden_states_layer: int | None = None,
    noise_level: torch.Tensor | None = None,
) -> DoDLoss:
    """Mean squared error of the transformer, jointly differentiable in both models.

    Args:
        transformer ([`DoDTransformer2DModel`]): wrapped or not.
        latent_embedder ([`DoDLatentEmbedder`], *optional*): wrapped or not; without one, no row sees a prior.
        latents (`torch.Tensor`):
            clean latents, which the embedder reads, `(batch, channels, height, width)`. Noise added here reaches the
            embedder only, for `example` is made already.
        class_labels (`torch.Tensor`): `(batch,)`, already dropped where they should be.
        example ([`DiffusionExample`]): what to denoise.
        num_prior_rows (`int`): the first rows that see their prior ([`count_prior_rows`]).
        weighting (`torch.Tensor`, *optional*): `(batch,)`, weight of each row's error.
        code_noise (`torch.Tensor`, *optional*):
            noise at the embedder's bottleneck, `(batch, tokens, bottleneck_dim)`, see [`DoDLatentEmbedder`].
        hidden_states_layer (`int`, *optional*):
            Returns the transformer's hidden states after that many blocks, for [`repa_loss`].
        noise_level (`torch.Tensor`, *optional*): `(batch,)`, factor of `code_noise`, which the embedder may read.

    Raises:
        ValueError, TypeError: for tensors of other shapes or types, and for arguments that are not models.
    """
    check_instance("transformer", transformer, nn.Module)
    check_instance("latent_embedder", latent_embedder, nn.Module, type(None))
    check_instance("example", example, DiffusionExample)
    check_rows((None,) * 4, latents=latents)
    batch_size = len(latents)
    check_rows(tuple(latents.shape), noisy=example.noisy, target=example.target)
    if not torch.is_tensor(example.timesteps) or example.timesteps.shape != (batch_size,):
        raise ValueError(
            f"`timesteps` of the example is {shown(example.timesteps)}; it must be a tensor of ({batch_size},)."
        )
    check_rows((batch_size,), integers=True, class_labels=class_labels)
    if not isinstance(num_prior_rows, int) or not 0 <= num_prior_rows <= batch_size:
        raise ValueError(f"`num_prior_rows` is {shown(num_prior_rows)}; it must be an integer from 0 to {batch_size}.")
    if weighting is not None:
        check_rows((batch_size,), weighting=weighting)
    if code_noise is not None:
        check_rows((None,) * 3, code_noise=code_noise)
    if noise_level is not None:
        check_rows((batch_size,), noise_level=noise_level)
    if hidden_states_layer is not None:
        check_count("hidden_states_layer", hidden_states_layer)
    prior_tokens = None
    if num_prior_rows and latent_embedder is not None:
        noise, level = (None if each is None else each[:num_prior_rows] for each in (code_noise, noise_level))
        options = {"return_dict": False, "code_noise": noise, "noise_level": level}
        prior_tokens = latent_embedder(latents[:num_prior_rows], **options)[0]
        # A row of zeros is a sample without a prior.
        no_prior = prior_tokens.new_zeros(len(latents) - num_prior_rows, *prior_tokens.shape[1:])
        prior_tokens = torch.cat([prior_tokens, no_prior])
    prediction, *hidden_states = transformer(
        example.noisy,
        example.timesteps,
        class_labels,
        encoder_hidden_states=prior_tokens,
        return_dict=False,
        hidden_states_layer=hidden_states_layer,
    )
    # A learned variance, the second half of the channels, has no part in this loss.
    error = prediction[:, : latents.shape[1]].float() - example.target.float()
    per_sample = error.square().mean(dim=(1, 2, 3))
    if weighting is not None:
        per_sample = per_sample * weighting
    return DoDLoss(
        total=per_sample.mean(),
        with_prior=per_sample[:num_prior_rows].detach().mean(),
        without_prior=per_sample[num_prior_rows:].detach().mean(),
        per_sample=per_sample.detach(),
        hidden_states=hidden_states[0] if hidden_states else None,
    )
