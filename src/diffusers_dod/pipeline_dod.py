"""The DoD pipeline: class labels to images in stages, each later stage guided by the sample of the one before."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .adapters import DoDLoraLoaderMixin
from .arguments import (
    changed_tensors,
    check_callback,
    check_count,
    check_generator,
    check_intervals,
    check_numbers,
    check_per_stage,
    check_sample,
    check_scales,
    check_size,
    check_steps,
    check_switches,
    check_tensor,
    per_stage,
)
from .autoencoding import decode_latents, make_image_processor, vae_spatial_factor
from .compatibility import (
    check_code_model,
    check_components,
    check_kinds,
    check_loaded,
    check_scheduler,
    check_weak_model,
)
from .denoising import Denoising
from .guidance import DEFAULT_INTERVAL, GuiderGuidance, ScaleGuidance, StageGuidance, check_guidance
from .labels import ClassLabelsMixin, synonyms, text_labels
from .priors import PriorImage, PriorInputsMixin
from .repository import DoDRepositoryMixin


# Class guidance where a call gives none: of stage 1, of a stage after another, and of one that starts from codes.
FIRST_GUIDANCE, LATER_GUIDANCE, CODES_GUIDANCE = 1.5, 1.25, 2.0


@dataclass
class DoDPipelineOutput(BaseOutput):
    """
    Args:
        images (list of `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            The last stage's samples: PIL images, an array `(images, height, width, channels)` or a tensor `(images,
            channels, height, width)` in [0, 1], or latents.
        stages (`list`, *optional*): the same of every stage that ran, in order; `None` unless `return_stages=True`.
        codes (`torch.Tensor`, *optional*):
            Codes behind the first prior, without added noise, `(images, rows * columns, bottleneck_dim)`: generated,
            passed in, or encoded from `image` or the stage before. `None` if no stage had a prior.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    stages: list[list[PIL.Image.Image] | np.ndarray | torch.Tensor] | None = None
    codes: torch.Tensor | None = None


class DoDPipeline(DoDRepositoryMixin, ClassLabelsMixin, PriorInputsMixin, DiffusionPipeline, DoDLoraLoaderMixin):
    r"""Class-conditional image generation by Diffusion on Diffusion (Yue et al. 2024, arXiv 2410.08531).

    Stage 1 sees the class only. Every later stage restarts from noise and also sees prior tokens: once per stage, the
    latent embedder compresses the previous stage's sample to codes, a few numbers per patch, and decodes these to tokens.
    With a code model, the codes of the first stage are generated instead, so every stage sees a prior.

    Parameters:
        transformer ([`DoDTransformer2DModel`]): denoiser of all stages.
        latent_embedder ([`DoDLatentEmbedder`]): turns latents into prior tokens.
        scheduler ([`SchedulerMixin`]):
            A diffusers scheduler for the transformer's prediction type; an unsupported one is refused in the call.
        vae ([`ModelMixin`], *optional*): image autoencoder; `None` for a model of pixels.
        id2label (`dict` of `str` or `int` to `str`, *optional*):
            Class id to name, saved in the pipeline's config. A name may hold synonyms separated by commas.
        code_transformer ([`DoDTransformer2DModel`], *optional*):
            Model of the codes: denoises the embedder's normalised codes, `(batch, bottleneck_dim, rows, columns)`.
        code_scheduler ([`SchedulerMixin`], *optional*): its scheduler.
        guider ([`BaseGuidance`], *optional*):
            One of diffusers' guiders, instead of `guidance_scale`; it guides the stages, not the code model.
        weak_transformer ([`DoDTransformer2DModel`], *optional*):
            A weaker model for autoguidance (Karras et al. 2024, arXiv 2406.02507), such as an early checkpoint of
            `transformer` or one with fewer layers; of the same classes, latents, patch size and width.
        code_guidance_scale (`float`, defaults to 1.0):
            Class guidance of the code model in calls that do not name any, saved in the pipeline's config.
    """

    model_cpu_offload_seq = "code_transformer->latent_embedder->transformer->vae"
    _optional_components = ["vae", "code_transformer", "code_scheduler", "guider", "weak_transformer"]
    _callback_tensor_inputs = ["latents", "prior_tokens"]

    # Of the call that runs
    _num_stages = _current_stage = _num_timesteps = 0
    _interrupt = False
    _guidance_scale: Any = 1.0
    _prior_guidance_scale: Any = None
    _current_timestep: torch.Tensor | None = None

    def __init__(
        self,
        # Not the models' own classes: a repository's code for the pipeline is one file, and theirs are others.
        transformer: ModelMixin,
        latent_embedder: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict[Any, str] | None = None,
        code_transformer: ModelMixin | None = None,
        code_scheduler: SchedulerMixin | None = None,
        guider: BaseGuidance | None = None,
        weak_transformer: ModelMixin | None = None,
        code_guidance_scale: float = 1.0,
    ):
        super().__init__()
        components = {
            "transformer": transformer,
            "latent_embedder": latent_embedder,
            "scheduler": scheduler,
            "vae": vae,
            "code_transformer": code_transformer,
            "code_scheduler": code_scheduler,
            "guider": guider,
            "weak_transformer": weak_transformer,
        }
        check_kinds(components)
        self.register_modules(**components)
        id2label = text_labels(id2label)
        check_numbers(code_guidance_scale=code_guidance_scale)
        self.register_to_config(id2label=id2label, code_guidance_scale=code_guidance_scale)

        self.labels = synonyms(id2label or {})
        if transformer is None or latent_embedder is None:
            return
        check_components(transformer.config, latent_embedder.config, vae)
        if code_transformer is not None:
            check_code_model(code_transformer.config, transformer.config, latent_embedder.config)
        if weak_transformer is not None:
            check_weak_model(weak_transformer.config, transformer.config)
        self.spatial_factor = vae_spatial_factor(vae)
        self.image_processor = make_image_processor(vae, transformer.config)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str | None:
        """Pushes the pipeline with its code and a model card in one commit; returns its URL, `None` for a dry run.

        Args:
            repo_id (`str`): repository, created if missing.
            kwargs: arguments of [`diffusers_dod.hub.push_folder`]: `private`, `token`, ...; `license` is required.
        """
        try:
            from diffusers_dod.hub.push import push_pipeline
        except ImportError:  # this is a repository's own code, and the package is not installed: no card then
            return super().push_to_hub(repo_id, **kwargs)
        return push_pipeline(self, repo_id, **kwargs)

    # Properties that a callback may read; it changes guidance by setting `_guidance_scale` and
    # `_prior_guidance_scale`, and stops by setting `_interrupt`.
    @property
    def guidance_scale(self) -> float:
        """Class guidance of the stage that runs."""
        return self._guidance_scale

    @property
    def prior_guidance_scale(self) -> float | None:
        """Prior guidance of the stage that runs."""
        return self._prior_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        has_scale = self._guidance_scale != 1.0 or self._prior_guidance_scale not in (None, 1.0)
        return has_scale or (self.guider is not None and self._current_stage > 0)

    @property
    def current_stage(self) -> int:
        """The stage that runs, from 1."""
        return self._current_stage

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of all stages started so far."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        batch_size,
        num_stages,
        num_inference_steps,
        guidance_scale,
        prior_guidance_scale,
        guidance_interval,
        generator,
        height,
        width,
        latents,
        image,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
        prior_source,
        codes,
        code_num_inference_steps,
        code_guidance_scale,
        code_noise_level,
    ):
        check_count("num_stages", num_stages)
        if image is not None and num_stages < 2:
            raise ValueError("`image` replaces stage 1, so `num_stages` must be at least 2.")
        check_per_stage(
            num_stages,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            prior_guidance_scale=prior_guidance_scale,
            guidance_interval=guidance_interval,
        )
        check_steps(num_inference_steps, num_stages)
        if guidance_scale is not None:
            check_scales("guidance_scale", guidance_scale, num_stages)
        check_scales("prior_guidance_scale", prior_guidance_scale, num_stages, or_none=True)
        check_intervals(guidance_interval, num_stages)
        check_generator(generator, batch_size)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

        patch_size = self.transformer.config.patch_size
        if num_stages > 1 or prior_source == "codes":  # or a size that only the embedder cannot cut would fail late
            patch_size = math.lcm(patch_size, self.latent_embedder.config.patch_size)
        check_size(height, width, self.spatial_factor * patch_size)
        if latents is not None:
            check_tensor("latents", latents, (batch_size, *self._latent_shape(height, width)))
        check_scheduler(type(self.scheduler), self.scheduler.config, self.transformer.config)
        self.check_code_noise_level(code_noise_level)
        if prior_source == "codes" and codes is None:
            self.check_code_generation(height, width, code_num_inference_steps, code_guidance_scale)
        self.check_output_type(output_type)

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A stage's initial noise, standard normal, `(batch, channels, height/factor, width/factor)`."""
        if latents is None:
            shape = (batch_size, *self._latent_shape(height, width))
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype)

    @torch.no_grad()
    def generate_codes(
        self,
        class_ids: torch.Tensor,
        height: int,
        width: int,
        num_inference_steps: int = 30,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> torch.Tensor:
        """Generates codes with the code model, guided by the class in every step.

        Args:
            class_ids (`torch.Tensor`): `(images,)` of integers, on the code model's device.
            height (`int`): Height in pixels of the images that the codes are for.
            width (`int`): Width in pixels.
            guidance_scale (`float`, defaults to 1.0): Class guidance; the config's `code_guidance_scale` is not used.

        Returns:
            `torch.Tensor`: `(images, rows * columns, bottleneck_dim)`, not normalised.
        """
        self._current_stage, self._num_timesteps, self._interrupt = 0, 0, False
        self._guidance_scale, self._prior_guidance_scale = guidance_scale, None
        grid = self.latent_embedder.code_grid(*self._latent_shape(height, width)[1:])
        shape = (len(class_ids), self.code_transformer.config.in_channels, *grid)
        noise = randn_tensor(shape, generator=generator, device=class_ids.device, dtype=self.code_transformer.dtype)
        codes = self.denoise(
            self.code_scheduler,
            noise,
            class_ids,
            None,
            num_inference_steps,
            ScaleGuidance(self.code_transformer, "class", self._guidance_scales, (0.0, 1.0)),
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return self.latent_embedder.denormalize_codes(codes)

    def _guidance_scales(self) -> tuple[float, float | None]:
        return self._guidance_scale, self._prior_guidance_scale

    def prepare_guidance(self, guidance_drop: str | None, guidance_interval: tuple[float, float]) -> StageGuidance:
        """A stage's guidance: the guider's if there is one, else by the scales of the moment."""
        drop = guidance_drop or ("class" if self.weak_transformer is None else "nothing")
        if self.guider is not None:
            return GuiderGuidance(self.transformer, drop, self.guider, self.weak_transformer)
        return ScaleGuidance(self.transformer, drop, self._guidance_scales, guidance_interval, self.weak_transformer)

    def denoise(
        self,
        scheduler: SchedulerMixin,
        latents: torch.Tensor,
        class_ids: torch.Tensor,
        prior_tokens: torch.Tensor | None,
        num_inference_steps: int,
        guidance: StageGuidance,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> torch.Tensor:
        """Runs one stage, or the code model, from standard normal noise to its sample, with the scales of the moment."""
        run = Denoising(scheduler, latents, num_inference_steps, generator)
        latents = run.latents
        first_step, self._num_timesteps = self._num_timesteps, self._num_timesteps + len(run.timesteps)

        with self.progress_bar(total=len(run.timesteps)) as progress_bar:
            stage = f"Stage {self._current_stage}/{self._num_stages}" if self._current_stage else "Codes"
            progress_bar.set_description(stage)
            for i, timestep in enumerate(run.timesteps):
                if self._interrupt:
                    break
                self._current_timestep = timestep
                latents = run.step(i, latents, guidance, class_ids, prior_tokens)
                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    changed = callback_on_step_end(self, first_step + i, timestep, callback_kwargs)
                    latents, prior_tokens = changed_tensors(changed, latents=latents, prior_tokens=prior_tokens)
                progress_bar.update()
        self._current_timestep = None
        return latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Samples of a stage in the form that `output_type` names."""
        self.check_output_type(output_type)
        check_sample(latents, self.scheduler)
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | None | list[int | str | None] | torch.Tensor,
        num_stages: int | None = None,
        num_inference_steps: int | list[int] = 30,
        guidance_scale: float | list[float] | None = None,
        prior_guidance_scale: float | list[float] | None = None,
        guidance_drop: str | None = None,
        guidance_interval: tuple[float, float] | list[tuple[float, float]] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image: PriorImage | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_stages: bool = False,
        callback_on_step_end: Callable[["DoDPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        prior_source: str | None = None,
        codes: torch.Tensor | None = None,
        code_num_inference_steps: int = 30,
        code_guidance_scale: float | None = None,
        code_noise_level: float | None = None,
    ) -> DoDPipelineOutput | tuple:
        r"""Generates images of the given classes.

        Args:
            class_labels (`int`, `str`, `None`, or a `list` or `torch.Tensor` of them):
                Class ids in `[0, num_classes)` or names of `id2label`; `None` is an unconditional sample.
            num_stages (`int`, *optional*):
                Number of stages. By default 2, or 1 from codes, whose generation is not counted. With `image`, the
                skipped stage 1 is counted, so at least 2 are needed; lists then also have an entry for it.
            num_inference_steps (`int` or `list` of `int`, defaults to 30): Denoising steps, one entry per stage or one for all.
            guidance_scale (`float` or `list` of `float`, *optional*):
                Strength of classifier-free guidance; 1 turns it off. One entry per stage or one for all. By default 1.5 in
                a stage without a prior, 2 straight from codes, 1.25 after a stage or `image`. Not with a `guider`.
            prior_guidance_scale (`float` or `list` of `float`, *optional*):
                Separate guidance scale for the prior; each guided step then makes a third prediction, and
                `guidance_scale` guides by the class only. In a stage without a prior, `guidance_drop` still applies. Not
                with a `guider` or a `weak_transformer`.
            guidance_drop (`str`, *optional*):
                The condition left out of guidance's second prediction: `"class"` (default), `"prior"`, `"both"`, or
                `"nothing"`, the default with a `weak_transformer`, which needs that model or a guider that changes layers.
            guidance_interval (`tuple` of two `float`, or a `list` of such tuples, *optional*):
                The steps that are guided, as fractions of the stage's steps from noise (0) to sample (1), by default
                `(0.25, 0.75)`; `(0, 1)` guides every step (Kynkäänniemi et al. 2024, arXiv 2404.07724). One tuple for all
                stages or a list with one per stage. Not with a `guider`.
            num_images_per_prompt (`int`, defaults to 1): Images per label.
            height (`int`, *optional*):
                Height in pixels; by default that of `latents`, or the transformer's `sample_size` times the VAE's factor.
            width (`int`, *optional*): Width in pixels, with the same default.
            generator (`torch.Generator` or a `list` of them, *optional*):
                Source of all noise. With a list, one for each image, an image does not depend on its batch.
            latents (`torch.Tensor`, *optional*):
                Standard normal noise for the first stage that runs, `(images, channels, height, width)`. Later stages
                draw from `generator`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list, *optional*):
                Your own picture in place of stage 1's sample; stage 1 is then skipped. One for all images, one per label
                or one per image. PIL images are resized and cropped; arrays `(..., height, width, channels)` and tensors
                `(..., channels, height, width)` hold values in [0, 1] and are resized. A tensor is taken as latents if it
                has their shape (with a VAE) or negative values (without one).
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DoDPipelineOutput`] or a tuple.
            return_stages (`bool`, defaults to `False`): Whether to also return every stage's samples.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, timestep, kwargs)` after each step; `step` counts from 0 over the
                code model and all stages. Returns a dict of the tensors that it changed. It may set
                `pipeline._guidance_scale` and `pipeline._prior_guidance_scale`: for the rest of the call, or of the
                stage if that argument is a list, as the default `guidance_scale` is.
                `pipeline._interrupt = True` ends the call with the sample as it is. During code generation,
                `pipeline.current_stage` is 0, `latents` are the normalised codes, the scale is that of the codes, and an
                interrupt leaves the first stage's noise.
            callback_on_step_end_tensor_inputs (`list` of `str`, defaults to `["latents"]`):
                Tensors passed to the callback: `"latents"`, `"prior_tokens"`.
            prior_source (`str`, *optional*):
                `"codes"` starts from the given `codes` or the code model's, `"stage"` from stage 1 or `image`. By default
                `"stage"` with `image`, else `"codes"` if `codes` are given or there is a code model, else `"stage"`.
            codes (`torch.Tensor`, *optional*):
                Your own codes, as `.codes` of an output or `latent_embedder.encode` has them, `(images, rows * columns,
                bottleneck_dim)`; also one set for all images or one per label.
            code_num_inference_steps (`int`, defaults to 30): Steps of the code model.
            code_guidance_scale (`float`, *optional*):
                Class guidance of the code model, in every step; by default the pipeline's own.
            code_noise_level (`float`, *optional*):
                Noise on the codes that a stage sees, relative to their root mean square, in [0, 1]; 0.3 by default. Only
                for an embedder with `noise_level_input`, which reads the level. Returned codes are without this noise.

        Examples:
            ```py
            >>> import torch
            >>> from diffusers_dod import DoDPipeline

            >>> pipe = DoDPipeline.from_pretrained("examples/pretrained/digits")
            >>> images = pipe([3, 7], num_inference_steps=12, generator=torch.Generator().manual_seed(0)).images
            >>> images[0].save("three.png")
            ```

        Returns:
            [`DoDPipelineOutput`], or with `return_dict=False` the tuple `(images,)` or `(images, stages)`.

        Raises:
            ValueError: for arguments that do not fit the model, the scheduler or each other.
        """
        # 1. What to make, and whether it can be made
        check_loaded(self.components)
        label_ids = self.prepare_class_labels(class_labels)
        check_count("num_images_per_prompt", num_images_per_prompt)
        batch_size = len(label_ids) * num_images_per_prompt
        prior_source = self.choose_prior_source(prior_source, codes, image)
        if num_stages is None:
            num_stages = 1 if prior_source == "codes" else 2
        sample_size = self.transformer.config.sample_size
        sample_height, sample_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if torch.is_tensor(latents) and latents.ndim == 4:
            sample_height, sample_width = latents.shape[-2:]
        height = sample_height * self.spatial_factor if height is None else height
        width = sample_width * self.spatial_factor if width is None else width
        check_guidance(
            self.guider,
            self.transformer,
            self.weak_transformer,
            guidance_scale,
            prior_guidance_scale,
            guidance_drop,
            guidance_interval,
        )
        guidance_interval = DEFAULT_INTERVAL if guidance_interval is None else guidance_interval
        if code_guidance_scale is None:
            code_guidance_scale = self.config.code_guidance_scale
        check_switches(return_dict=return_dict, return_stages=return_stages)
        on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            batch_size,
            num_stages,
            num_inference_steps,
            guidance_scale,
            prior_guidance_scale,
            guidance_interval,
            generator,
            height,
            width,
            latents,
            image,
            output_type,
            *on_step_end,
            prior_source,
            codes,
            code_num_inference_steps,
            code_guidance_scale,
            code_noise_level,
        )
        if self.guider is not None:
            guidance_scale = 1.0  # of the pipeline's own
        elif guidance_scale is None:
            first = CODES_GUIDANCE if prior_source == "codes" else FIRST_GUIDANCE
            guidance_scale = [first] + [LATER_GUIDANCE] * (num_stages - 1)
        device, dtype = self._execution_device, self.transformer.dtype
        class_ids = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_prompt)
        latent_size = self._latent_shape(height, width)[1:]
        self._num_stages, self._num_timesteps, self._interrupt = num_stages, 0, False
        self._current_timestep, self._current_stage = None, 0

        # 2. What stands for the first stage's sample: codes, or a user's picture
        prior_latents, first_stage = None, 1
        if codes is not None:
            codes = self.prepare_codes(codes, batch_size, height, width, dtype, device)
        elif prior_source == "codes":
            codes = self.generate_codes(
                *(class_ids, height, width, code_num_inference_steps, code_guidance_scale, generator), *on_step_end
            )
        if image is not None:
            prior_latents = self.prepare_image_latents(
                image, batch_size, num_images_per_prompt, height, width, dtype, device
            )
            first_stage = 2

        # 3. Stages, each from fresh noise
        stage_latents = []
        for stage in range(first_stage, num_stages + 1):
            self._current_stage = stage
            # One scale for all stages is set once, so that what a callback makes of it lasts.
            if stage == first_stage or isinstance(guidance_scale, list):
                self._guidance_scale = per_stage(guidance_scale, num_stages)[stage - 1]
            if stage == first_stage or isinstance(prior_guidance_scale, list):
                self._prior_guidance_scale = per_stage(prior_guidance_scale, num_stages)[stage - 1]
            prior_tokens, code_noise = None, {}
            if prior_latents is not None or codes is not None:
                where = (batch_size, height, width, dtype, device)
                code_noise = self.prepare_code_noise(code_noise_level, *where, generator)
            if prior_latents is not None:
                prior_tokens, stage_codes = self.latent_embedder(prior_latents, return_dict=False, **code_noise)
                codes = stage_codes if codes is None else codes
            elif codes is not None:
                prior_tokens = self.latent_embedder.decode(codes, *latent_size, **code_noise)
            noise = self.prepare_latents(batch_size, height, width, dtype, device, generator, latents)
            prior_latents = self.denoise(
                self.scheduler,
                noise,
                class_ids,
                prior_tokens,
                per_stage(num_inference_steps, num_stages)[stage - 1],
                self.prepare_guidance(guidance_drop, per_stage(guidance_interval, num_stages)[stage - 1]),
                generator,
                *on_step_end,
            )
            stage_latents.append(prior_latents)
            latents = None
            if self._interrupt:
                break

        # 4. Images
        images = self.decode(stage_latents[-1], output_type)
        stages = None
        if return_stages:
            stages = [self.decode(sample, output_type) for sample in stage_latents[:-1]] + [images]
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, stages) if return_stages else (images,)
        return DoDPipelineOutput(images=images, stages=stages, codes=codes)
