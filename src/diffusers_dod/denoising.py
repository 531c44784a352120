"""One run of a scheduler over a guided model, step by step; the pipeline and the modular blocks have the loop."""

import inspect

import torch
from diffusers import SchedulerMixin

from .compatibility import keeps_variance
from .guidance import StageGuidance


class Denoising:
    """From standard normal noise to a sample.

    Args:
        scheduler (`SchedulerMixin`): starts anew, because multistep ones remember earlier predictions.
        noise (`torch.Tensor`): standard normal, `(batch, channels, height, width)`.
        num_inference_steps (`int`): steps of the scheduler.
        generator (`torch.Generator` or a `list` of them, *optional*): noise of schedulers that draw some in each step.

    Attributes:
        timesteps (`torch.Tensor`): of the steps; some schedulers have more of them than `num_inference_steps`.
        latents (`torch.Tensor`): the noise as the scheduler scales it, where the first step starts.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        noise: torch.Tensor,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it looks the first timestep up, for which a GPU must stop
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        # Only now, because a scheduler's noise scale may depend on its steps.
        self.latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        draws_noise = "generator" in inspect.signature(scheduler.step).parameters
        self._step_kwargs = {"generator": generator} if draws_noise else {}
        self._keeps_variance = keeps_variance(type(scheduler), scheduler.config)

    def step(
        self,
        index: int,
        latents: torch.Tensor,
        guidance: StageGuidance,
        class_ids: torch.Tensor,
        prior_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """The latents after step `index`, which starts from 0."""
        timestep, model_input = self.timesteps[index], latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(latents, timestep)
        prediction, variance = guidance(model_input, timestep, index, len(self.timesteps), class_ids, prior_tokens)
        if self._keeps_variance:
            prediction = torch.cat([prediction, variance], dim=1)
        return self.scheduler.step(prediction, timestep, latents, **self._step_kwargs, return_dict=False)[0]
