"""A training step's parts: what chance decides, what each row is trained on, the loss as one module, and its sums."""

import argparse
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from diffusers.utils.torch_utils import randn_tensor

from ..data.batches import to_features, to_latents
from ..latent_embedder_dod import DoDLatentEmbedder
from ..randomness import step_generator
from ..transformer_dod import DoDTransformer2DModel
from .build import REPAParts
from .objective import DiffusionExample, count_prior_rows, ddpm_example, dod_loss, drop_labels, flow_example
from .repa import REPAProjector, repa_loss


class StepDraws(NamedTuple):
    """What chance decides about each row of a global batch, `(rows,)` each, and how many first rows see a prior."""

    mirrored: torch.Tensor
    class_draws: torch.Tensor
    times: torch.Tensor
    noise_levels: torch.Tensor
    num_prior_rows: int

    def of_rows(self, rows: torch.Tensor, device: torch.device) -> "StepDraws":
        """The draws of one process's rows."""
        mirrored, class_draws, times, levels = (draw[rows].to(device, non_blocking=True) for draw in self[:4])
        return StepDraws(mirrored, class_draws, times, levels, int((rows < self.num_prior_rows).sum()))


def draw_step(args: argparse.Namespace, step: int, num_rows: int, noise_scheduler: DDPMScheduler | None) -> StepDraws:
    """Draws for all rows in every process, which then takes its own."""
    generator = step_generator(args.seed, step)
    prior_rows = count_prior_rows(num_rows, args.prior_drop, generator)
    mirrored = torch.rand(num_rows, generator=generator) < (0.5 if args.random_flip else 0)
    class_draws = torch.rand(num_rows, generator=generator)
    if noise_scheduler is not None:
        times = torch.randint(noise_scheduler.config.num_train_timesteps, (num_rows,), generator=generator)
    else:
        shape = (args.logit_mean, args.logit_std, args.mode_scale)
        times = compute_density_for_timestep_sampling(args.timestep_density, num_rows, *shape, generator=generator)
    noise_levels = torch.rand(num_rows, generator=generator)
    return StepDraws(mirrored, class_draws, times, noise_levels, prior_rows)


class Inputs(NamedTuple):
    """What the models are trained on; the arguments of [`dod_loss`] of the same names.

    Args:
        latents (`torch.Tensor`): what the embedder reads, `(batch, channels, height, width)`.
    """

    latents: torch.Tensor
    example: DiffusionExample
    weighting: torch.Tensor | None
    code_noise: torch.Tensor | None
    noise_level: torch.Tensor | None


def make_inputs(
    args: argparse.Namespace,
    latents: torch.Tensor,
    times: torch.Tensor,
    noise_levels: torch.Tensor,
    generators: list[torch.Generator],
    noise_scheduler: DDPMScheduler | None,
    embedder: DoDLatentEmbedder | None,
) -> Inputs:
    """Clean latents to an example to denoise and what the embedder reads, with noise on it or its codes if asked for."""
    noise = randn_tensor(latents.shape, generator=generators, device=latents.device)
    weighting, code_noise, noise_level = None, None, None
    if noise_scheduler is not None:
        example = ddpm_example(latents, noise, times, noise_scheduler)
    else:
        example = flow_example(latents, noise, times)
        # The least noise of diffusers' schedulers, for sigma_sqrt is infinite without any.
        weighting = compute_loss_weighting_for_sd3(args.weighting, times.clamp(min=1e-3))
    if args.embedder_noise:
        noise = randn_tensor(latents.shape, generator=generators, device=latents.device)
        latents = latents + args.embedder_noise * noise
    if args.bottleneck_noise and embedder is not None:
        tokens = latents[0, 0].numel() // embedder.config.patch_size**2
        shape = (len(latents), tokens, embedder.config.bottleneck_dim)
        code_noise = randn_tensor(shape, generator=generators, device=latents.device)
        if embedder.config.noise_level_input:
            noise_level = args.bottleneck_noise * noise_levels
        else:
            code_noise = args.bottleneck_noise * code_noise
    return Inputs(latents, example, weighting, code_noise, noise_level)


class TrainingModule(torch.nn.Module):
    """Models, REPA's projector and the loss as one module: one forward for DDP to synchronise and autocast to cover."""

    # FSDP shards these by themselves.
    _no_split_modules = [*DoDTransformer2DModel._no_split_modules, *DoDLatentEmbedder._no_split_modules]

    def __init__(
        self,
        transformer: DoDTransformer2DModel,
        latent_embedder: DoDLatentEmbedder | None,
        repa_projector: REPAProjector | None,
        repa_layer: int,
        repa_weight: float,
    ):
        super().__init__()
        self.transformer, self.latent_embedder, self.repa_projector = transformer, latent_embedder, repa_projector
        self.repa_layer, self.repa_weight = repa_layer, repa_weight

    def forward(
        self, inputs: Inputs, class_labels: torch.Tensor, num_prior_rows: int, features: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns what to differentiate, each row's denoising loss, and REPA's loss where it takes part."""
        loss = dod_loss(
            self.transformer,
            self.latent_embedder,
            inputs.latents,
            class_labels,
            inputs.example,
            num_prior_rows,
            weighting=inputs.weighting,
            code_noise=inputs.code_noise,
            noise_level=inputs.noise_level,
            hidden_states_layer=None if self.repa_projector is None else self.repa_layer,
        )
        if self.repa_projector is None or features is None:
            return loss.total, loss.per_sample, None
        alignment = repa_loss(self.repa_projector(loss.hidden_states), features)
        return loss.total + self.repa_weight * alignment, loss.per_sample, alignment.detach()


class StepSums:
    """Sums over a global batch, kept on the device; the host reads them once per step."""

    NAMES = ("loss_with_prior", "rows_with_prior", "loss_without_prior", "rows_without_prior", "loss_repa", "stops")

    def __init__(self, device: torch.device):
        self.values = torch.zeros(len(self.NAMES), device=device)

    def add(self, **sums: torch.Tensor | float) -> None:
        for name, value in sums.items():
            self.values[self.NAMES.index(name)] += value

    def read(self, accelerator: Accelerator, grad_norm: torch.Tensor) -> dict[str, float]:
        """The sums over all processes and the `grad_norm`, which every process has; starts anew."""
        reduced = accelerator.reduce(self.values)
        values = torch.cat([reduced, grad_norm.detach().reshape(1).to(reduced)]).tolist()
        self.values.zero_()
        return dict(zip((*self.NAMES, "grad_norm"), values))


def losses(sums: dict[str, float]) -> dict[str, float]:
    """The mean losses of a step by the names of the logs; of rows with a prior and without where there were any."""
    both = ("with_prior", "without_prior")
    rows = sum(sums[f"rows_{kind}"] for kind in both)
    logs = {"loss": sum(sums[f"loss_{kind}"] for kind in both) / rows}
    logs |= {f"loss_{kind}": sums[f"loss_{kind}"] / sums[f"rows_{kind}"] for kind in both if sums[f"rows_{kind}"]}
    return logs


class GradientStep(NamedTuple):
    """Adds the gradients of some rows to those of a step, and their losses to its sums. Nothing in it waits for the device.

    Args:
        args: the options of the run.
        accelerator (`Accelerator`): which synchronises the processes with the last rows of a step.
        module ([`TrainingModule`]): as accelerate prepared it.
        denoiser ([`DoDTransformer2DModel`]): the transformer in it.
        embedder ([`DoDLatentEmbedder`], *optional*): the embedder in it.
        vae (`ModelMixin`, *optional*): the autoencoder, if any.
        repa ([`REPAParts`], *optional*): REPA's parts, if any.
        noise_scheduler (`DDPMScheduler`, *optional*): `None` for flow matching.
        sums ([`StepSums`]): of the step.
        shares (`int`): into how many parts, of processes and accumulation, the rows of a step are dealt.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    module: torch.nn.Module
    denoiser: DoDTransformer2DModel
    embedder: DoDLatentEmbedder | None
    vae: ModelMixin | None
    repa: REPAParts | None
    noise_scheduler: DDPMScheduler | None
    sums: StepSums
    shares: int

    def __call__(self, batch: dict[str, torch.Tensor], draws: StepDraws, generators: list[torch.Generator]) -> None:
        """
        Args:
            batch (`dict` of `torch.Tensor`): images or latents with labels, on the device.
            draws ([`StepDraws`]): of these rows, on the device.
            generators (`list` of `torch.Generator`): one per row.
        """
        # 1. Images, noise, times, class and prior drops
        args, repa, mirrored = self.args, self.repa, draws.mirrored
        latents = to_latents(batch, self.vae, mirrored, generators)
        features = None if repa is None else to_features(batch, repa.encoder, repa.grid, mirrored)
        inputs = make_inputs(
            args, latents, draws.times, draws.noise_levels, generators, self.noise_scheduler, self.embedder
        )
        num_classes = self.denoiser.config.num_classes
        labels = drop_labels(batch["label"], num_classes, args.class_drop, draws.class_draws)

        # 2. Loss and gradients
        with self.accelerator.accumulate(self.module):
            with self.accelerator.autocast():  # accelerate's own is not around modules of FSDP2
                loss, per_sample, alignment = self.module(inputs, labels, draws.num_prior_rows, features)
            self.accelerator.backward(loss)

        # 3. Sums
        with_prior, without = per_sample.split([draws.num_prior_rows, len(labels) - draws.num_prior_rows])
        self.sums.add(loss_with_prior=with_prior.sum(), rows_with_prior=len(with_prior))
        self.sums.add(loss_without_prior=without.sum(), rows_without_prior=len(without))
        if alignment is not None:
            self.sums.add(loss_repa=alignment / self.shares)
