"""The DoD pipeline: class labels to images in stages, each later stage guided by the sample of the one before."""

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Optional

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .autoencoding import decode_latents, encode_images, vae_spatial_factor
from .compatibility import check_components, check_scheduler, keeps_variance
from .repository import DoDRepositoryMixin


PriorImage = PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray]


@dataclass
class DoDPipelineOutput(BaseOutput):
    """
    Args:
        images (list of `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): the last stage's samples.
        stages (`list`, *optional*): every stage's samples, the first that ran first; `None` unless asked for.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    stages: list[list[PIL.Image.Image] | np.ndarray | torch.Tensor] | None = None


# The Sana mixin is the plainest of diffusers' LoRA loaders: a transformer's adapters and nothing model-specific.
class DoDPipeline(DoDRepositoryMixin, DiffusionPipeline, SanaLoraLoaderMixin):
    r"""Class-conditional image generation by Diffusion on Diffusion (Yue et al. 2024, arXiv 2410.08531).

    Stage 1 sees the class only. Every later stage restarts from noise and also sees the prior tokens that the latent
    embedder reads off the stage before; the embedder runs once a stage.

    Parameters:
        transformer ([`DoDTransformer2DModel`]): denoiser of all stages.
        latent_embedder ([`DoDLatentEmbedder`]): makes prior tokens of latents.
        scheduler ([`SchedulerMixin`]): any of diffusers' schedulers that reads the transformer's prediction type.
        vae ([`ModelMixin`], *optional*): image autoencoder; `None` is pixel space.
        id2label (`dict` of `str` or `int` to `str`, *optional*):
            Class id to name, saved in the pipeline's config. A name may hold synonyms separated by commas.
    """

    model_cpu_offload_seq = "latent_embedder->transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "prior_tokens"]

    # Of the call that runs
    _num_stages: int
    _current_stage: int
    _num_timesteps: int
    _interrupt: bool

    def __init__(
        self,
        # Not the models' own classes: a repository's code for the pipeline is one file, and theirs are others.
        transformer: ModelMixin,
        latent_embedder: ModelMixin,
        scheduler: SchedulerMixin,
        vae: Optional[ModelMixin] = None,  # noqa: UP045 - diffusers before 0.37 cannot load with `X | None` here
        id2label: Optional[dict[Any, str]] = None,  # noqa: UP045
    ):
        super().__init__()
        self.register_modules(transformer=transformer, latent_embedder=latent_embedder, scheduler=scheduler, vae=vae)
        # JSON turns integer keys into strings, so they are strings from the start.
        id2label = {str(class_id): name for class_id, name in (id2label or {}).items()}
        self.register_to_config(id2label=id2label or None)

        self.labels: dict[str, list[int]] = {}
        for class_id, name in id2label.items():
            for synonym in dict.fromkeys([name.strip(), *(part.strip() for part in name.split(","))]):
                self.labels.setdefault(synonym, []).append(int(class_id))

        if transformer is None or latent_embedder is None:
            return
        check_components(transformer.config, latent_embedder.config, vae)
        channels = transformer.config.in_channels
        self.spatial_factor = vae_spatial_factor(vae)
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.spatial_factor * transformer.config.patch_size,
            vae_latent_channels=0,  # `prepare_image_latents` tells latents from pictures itself
            do_convert_rgb=vae is not None or channels == 3,
            do_convert_grayscale=vae is None and channels == 1,
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Pushes the pipeline with its code and a model card in one commit; returns the commit's address.

        Args:
            repo_id (`str`): repository, made if need be.
            kwargs: arguments of [`diffusers_dod.hub.push_folder`], such as `license`, `private`, `variant`, `token`.
        """
        try:
            from diffusers_dod.hub.push import push_pipeline
        except ImportError:  # this is a repository's own code, and the package is not installed: no card then
            return super().push_to_hub(repo_id, **kwargs)
        return str(push_pipeline(self, repo_id, **kwargs))

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
        return self._guidance_scale != 1.0 or self._prior_guidance_scale not in (None, 1.0)

    @property
    def current_stage(self) -> int:
        """The stage that runs, from 1."""
        return self._current_stage

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        """Denoising steps so far planned, over all stages that started."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of label names.

        Args:
            label (`str` or `list` of `str`): one name or several; a name of `id2label` or one of its synonyms.

        Raises:
            ValueError: for an unknown name, with the nearest ones, and for a name that several classes share.
        """
        ids = []
        for name in [label] if isinstance(label, str) else label:
            matches = self.labels.get(name.strip(), [])
            if not self.labels:
                raise ValueError(f"This pipeline has no label names, so {name!r} is unknown: pass class ids instead.")
            if not matches:
                near = difflib.get_close_matches(name, self.labels, n=3, cutoff=0.0)
                raise ValueError(f"{name!r} is not a label. The nearest are {', '.join(map(repr, near))}.")
            if len(matches) > 1:
                raise ValueError(f"{name!r} names the classes {matches}: pass one of these ids instead.")
            ids.append(matches[0])
        return ids

    def prepare_class_labels(self, class_labels: int | str | None | list | torch.Tensor) -> list[int]:
        """Class ids of whatever names the classes; `None` becomes the null class.

        Args:
            class_labels: an id, a name, `None` (unconditional) or a list or tensor of them.

        Raises:
            ValueError: if the list is empty, an id is out of range or a name is unknown.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("`class_labels` is empty: pass at least one class id or name.")

        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            if label is None:
                ids.append(num_classes)
            elif isinstance(label, str):
                ids += self.get_label_ids(label)
            elif self._is_count(label, least=0) and label < num_classes:
                ids.append(int(label))
            else:
                raise ValueError(
                    f"Class {label!r} is out of range: this model has {num_classes} classes, so pass an integer from 0 "
                    f"to {num_classes - 1}, or None for an unconditional sample."
                )
        return ids

    def check_inputs(
        self,
        batch_size,
        num_stages,
        num_inference_steps,
        guidance_scale,
        prior_guidance_scale,
        guidance_drop,
        guidance_interval,
        generator,
        height,
        width,
        latents,
        image,
        output_type,
        callback_on_step_end_tensor_inputs,
    ):
        if not self._is_count(num_stages):
            raise ValueError(f"`num_stages` is {num_stages!r}; it must be an integer of at least 1.")
        if image is not None and num_stages < 2:
            raise ValueError("`image` replaces stage 1, so `num_stages` must be at least 2.")
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("guidance_scale", guidance_scale),
            ("prior_guidance_scale", prior_guidance_scale),
            ("guidance_interval", guidance_interval),
        ):
            if isinstance(value, list) and len(value) != num_stages:
                raise ValueError(
                    f"`{name}` has {len(value)} entries for {num_stages} stages: pass one entry a stage, or one value."
                )
        for steps in self._per_stage(num_inference_steps, num_stages):
            if not self._is_count(steps):
                raise ValueError(f"`num_inference_steps` is {steps!r}; every stage needs an integer of at least 1.")
        for name, value in (("guidance_scale", guidance_scale), ("prior_guidance_scale", prior_guidance_scale)):
            for scale in self._per_stage(value, num_stages):
                if name == "prior_guidance_scale" and scale is None:
                    continue
                if not isinstance(scale, Real) or not math.isfinite(scale):
                    raise ValueError(f"`{name}` is {scale!r}; every stage needs a finite number.")
        for interval in self._per_stage(guidance_interval, num_stages):
            is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2
            if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
                raise ValueError(
                    f"`guidance_interval` is {interval!r}; pass a tuple (start, stop) with 0 <= start <= stop <= 1, or "
                    "a list of them, one a stage."
                )
        if guidance_drop not in ("class", "prior", "both"):
            raise ValueError(f"`guidance_drop` is {guidance_drop!r}; use 'class', 'prior' or 'both'.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators for {batch_size} images: pass one, or one for each of the images."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; use 'pil', 'np', 'pt' or 'latent'.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; only {self._callback_tensor_inputs} can be passed."
            )

        patch_size = self.transformer.config.patch_size
        if num_stages > 1:  # or a size that only the embedder cannot cut would fail after stage 1
            patch_size = math.lcm(patch_size, self.latent_embedder.config.patch_size)
        multiple = self.spatial_factor * patch_size
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"A {height}x{width} image does not fit: height and width must be multiples of {multiple}."
            )
        shape = (batch_size, *self._latent_shape(height, width))
        if latents is not None:
            if not torch.is_tensor(latents) or tuple(latents.shape) != shape:
                given = tuple(latents.shape) if torch.is_tensor(latents) else type(latents).__name__
                raise ValueError(f"`latents` is {given}; for these arguments it must be a tensor of {shape}.")
            if not torch.isfinite(latents).all():
                raise ValueError("`latents` holds NaN or infinite values.")
        check_scheduler(type(self.scheduler), self.scheduler.config, self.transformer.config)

    @staticmethod
    def _is_count(value: Any, least: int = 1) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least

    @staticmethod
    def _per_stage(value: Any, num_stages: int) -> list:
        return value if isinstance(value, list) else [value] * num_stages

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        channels = self.transformer.config.in_channels
        return channels, height // self.spatial_factor, width // self.spatial_factor

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

    def prepare_image_latents(
        self,
        image: PriorImage,
        batch_size: int,
        num_images_per_prompt: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Latents of a user's own picture, which stand for the sample of stage 1.

        Args:
            image: one picture for all samples, one for each label or one for each sample: PIL, array or tensor in
                [0, 1], or latents. A tensor of exactly the latents' shape is taken as latents; without a VAE, where
                pictures have that shape too, one with negative values is.
            batch_size (`int`), num_images_per_prompt (`int`): samples, and samples a label.
            height (`int`), width (`int`): of the samples; PIL pictures are cropped to that size.

        Raises:
            ValueError: for a picture that is not in [0, 1], not finite, or does not fit the model or the batch.
        """
        latent_shape = self._latent_shape(height, width)
        if isinstance(image, list) and not image:
            raise ValueError("`image` is an empty list: pass at least one picture.")
        if torch.is_tensor(image) and (
            tuple(image.shape[-3:]) == latent_shape if self.vae is not None else bool((image < 0).any())
        ):
            image_latents = (image if image.ndim == 4 else image[None]).to(device=device, dtype=dtype)
        else:
            is_pil = isinstance(image[0] if isinstance(image, list) else image, PIL.Image.Image)
            pixels = self.image_processor.preprocess(image, height, width, resize_mode="crop" if is_pil else "default")
            channels = latent_shape[0] if self.vae is None else 3
            if pixels.shape[1] != channels:
                raise ValueError(
                    f"`image` has {pixels.shape[1]} channels: pass a picture of {channels}, or latents of {latent_shape}."
                )
            if pixels.abs().max() > 1.01:  # 1 and some rounding
                raise ValueError("`image` holds values outside of [0, 1]: divide an 8-bit image by 255.")
            image_latents = encode_images(self.vae, pixels.to(device=device, dtype=dtype)).to(dtype)
        if not torch.isfinite(image_latents).all():
            raise ValueError("`image` holds NaN or infinite values, or the VAE made them of it.")

        num_labels = batch_size // num_images_per_prompt
        if image_latents.shape[0] == 1:
            image_latents = image_latents.expand(batch_size, -1, -1, -1)
        elif image_latents.shape[0] == num_labels:
            image_latents = image_latents.repeat_interleave(num_images_per_prompt, dim=0)
        if tuple(image_latents.shape) != (batch_size, *latent_shape):
            raise ValueError(
                f"`image` gives latents of {tuple(image_latents.shape)}; for these arguments they must be "
                f"{(batch_size, *latent_shape)}, with one picture or one for each label."
            )
        return image_latents

    def prepare_guidance(
        self, class_ids: torch.Tensor, prior_tokens: torch.Tensor | None, guidance_drop: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Labels and prior tokens of a guided step's whole batch: the samples, then the same with conditions dropped.

        With separate scales the parts are (class, prior), (null, prior), (null, none); otherwise (class, prior) and
        the part that `guidance_drop` asks for. Stage 1 has no prior, so there the parts are (class) and (null).
        """
        null_ids = torch.full_like(class_ids, self.transformer.config.num_classes)
        if prior_tokens is None:
            return torch.cat([class_ids, null_ids]), None
        no_prior = torch.zeros_like(prior_tokens)
        if self._prior_guidance_scale is not None:
            return torch.cat([class_ids, null_ids, null_ids]), torch.cat([prior_tokens, prior_tokens, no_prior])
        dropped_ids = class_ids if guidance_drop == "prior" else null_ids
        dropped_prior = prior_tokens if guidance_drop == "class" else no_prior
        return torch.cat([class_ids, dropped_ids]), torch.cat([prior_tokens, dropped_prior])

    def _is_guided(self, prior_tokens: torch.Tensor | None, guidance_drop: str) -> bool:
        if prior_tokens is None:
            # Stage 1 has no prior to lose, so only the class can guide it.
            return self._guidance_scale != 1.0 and (guidance_drop != "prior" or self._prior_guidance_scale is not None)
        return self.do_classifier_free_guidance

    def combine_guidance(self, predictions: list[torch.Tensor]) -> torch.Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) over the parts of [`prepare_guidance`].

        Three parts take separate scales for class and prior, as InstructPix2Pix does for text and image (Brooks et al.
        2022, arXiv 2211.09800).
        """
        if len(predictions) == 3:
            full, prior_only, none = predictions
            return none + self._prior_guidance_scale * (prior_only - none) + self._guidance_scale * (full - prior_only)
        full, dropped = predictions
        return dropped + self._guidance_scale * (full - dropped)

    def denoise(
        self,
        latents: torch.Tensor,
        class_ids: torch.Tensor,
        prior_tokens: torch.Tensor | None,
        num_inference_steps: int,
        guidance_drop: str,
        guidance_interval: tuple[float, float],
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> torch.Tensor:
        """Runs one stage from standard normal noise to its sample, with the guidance scales of the moment."""
        # Every stage starts the scheduler, and any feature cache, anew: multistep ones remember earlier predictions.
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # else it looks the first timestep up, for which a GPU must stop
        if self.transformer.is_cache_enabled:
            self.transformer._reset_stateful_cache()
        # Only now, because a scheduler's noise scale may depend on its steps.
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        timesteps = self.scheduler.timesteps
        first_step, self._num_timesteps = self._num_timesteps, self._num_timesteps + len(timesteps)
        start, stop = (fraction * len(timesteps) for fraction in guidance_interval)
        step_parameters = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if "generator" in step_parameters else {}
        channels = latents.shape[1]
        has_variance = keeps_variance(type(self.scheduler), self.scheduler.config)
        parts: int | None = None

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            progress_bar.set_description(f"Stage {self._current_stage}/{self._num_stages}")
            for i, timestep in enumerate(timesteps):
                self._current_timestep = timestep
                is_guided = start <= i < stop and self._is_guided(prior_tokens, guidance_drop)
                ids, tokens = class_ids, prior_tokens
                if is_guided:
                    ids, tokens = self.prepare_guidance(class_ids, prior_tokens, guidance_drop)
                last_parts, parts = parts, len(ids) // len(class_ids)
                if last_parts not in (None, parts) and self.transformer.is_cache_enabled:
                    # What a cache holds has the rows of the last step, which are not this step's.
                    self.transformer._reset_stateful_cache()

                model_input = torch.cat([latents] * parts)
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(model_input, timestep)
                with self.transformer.cache_context("denoise"):
                    output = self.transformer(
                        model_input,
                        timestep=timestep.expand(len(ids)),
                        class_labels=ids,
                        encoder_hidden_states=tokens,
                        return_dict=False,
                    )[0]

                prediction, variance = output[:, :channels], output[: len(class_ids), channels:]
                if parts > 1:
                    prediction = self.combine_guidance(prediction.chunk(parts))
                if has_variance:
                    prediction = torch.cat([prediction, variance], dim=1)
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    changed = callback_on_step_end(self, first_step + i, timestep, callback_kwargs)
                    latents = changed.pop("latents", latents)
                    prior_tokens = changed.pop("prior_tokens", prior_tokens)
                progress_bar.update()
                if self._interrupt:
                    break
        self._current_timestep = None
        return latents

    def decode(self, latents: torch.Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Samples of a stage in the form that `output_type` names."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | None | list[int | str | None] | torch.Tensor,
        num_stages: int = 2,
        num_inference_steps: int | list[int] = 30,
        guidance_scale: float | list[float] = 1.5,
        prior_guidance_scale: float | list[float] | None = None,
        guidance_drop: str = "class",
        guidance_interval: tuple[float, float] | list[tuple[float, float]] = (0.25, 0.75),
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
    ) -> DoDPipelineOutput | tuple:
        r"""Generates images of the given classes.

        Args:
            class_labels (`int`, `str`, `None`, or a `list` or `torch.Tensor` of them):
                Class ids in `[0, num_classes)` or names of `id2label`; `None` is an unconditional sample.
            num_stages (`int`, defaults to 2): Stages, each with the sample of the one before as its prior.
            num_inference_steps (`int` or `list` of `int`, defaults to 30): Denoising steps, one entry a stage or one for all.
            guidance_scale (`float` or `list` of `float`, defaults to 1.5):
                Strength of classifier-free guidance; 1 turns it off. One entry a stage or one for all.
            prior_guidance_scale (`float` or `list` of `float`, *optional*):
                A scale of its own for the prior, at the cost of a third row a sample; `guidance_scale` is then the
                class's alone and `guidance_drop` is not read.
            guidance_drop (`str`, defaults to `"class"`):
                What the second branch of guidance goes without: `"class"`, `"prior"` or `"both"`.
            guidance_interval (pair of `float`, or a `list` of them, defaults to `(0.25, 0.75)`):
                The part of a stage's steps that is guided, as fractions of their number from noise (0) to sample (1);
                `(0, 1)` guides every step (Kynkäänniemi et al. 2024, arXiv 2404.07724).
            num_images_per_prompt (`int`, defaults to 1): Images a label.
            height (`int`, *optional*), width (`int`, *optional*):
                Size in pixels; by default that of `latents`, or the transformer's `sample_size` times the VAE's factor.
            generator (`torch.Generator` or a `list` of them, *optional*):
                Source of all noise. With a list, one for each image, an image does not depend on its batch.
            latents (`torch.Tensor`, *optional*):
                Standard normal noise for the first stage that runs, `(images, channels, height, width)`. Later stages
                draw from `generator`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list, *optional*):
                Your own picture in the place of stage 1's sample; stage 1 is then skipped. One for all images or one a
                label, in [0, 1] where it is an array; a tensor of the latents' shape is taken as latents.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DoDPipelineOutput`] or a tuple.
            return_stages (`bool`, defaults to `False`): Whether to also return every stage's samples.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, timestep, kwargs)` after each step, `step` counting over all
                stages; returns a dict with the tensors it changed. It may set `pipeline._guidance_scale` and
                `pipeline._prior_guidance_scale` (until the stage ends, where a list gives the next stage its own) and
                stop everything by `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list` of `str`, defaults to `["latents"]`):
                Tensors passed to the callback: `"latents"`, `"prior_tokens"`.

        Returns:
            [`DoDPipelineOutput`] or `tuple`: the images, and the list of all stages' where asked for.

        Raises:
            ValueError: for arguments that do not fit the model, the scheduler or each other.
        """
        # 1. What to make, and whether it can be made
        label_ids = self.prepare_class_labels(class_labels)
        if not self._is_count(num_images_per_prompt):
            raise ValueError(
                f"`num_images_per_prompt` is {num_images_per_prompt!r}; it must be an integer of at least 1."
            )
        batch_size = len(label_ids) * num_images_per_prompt
        sample_size = self.transformer.config.sample_size
        sample_height, sample_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if torch.is_tensor(latents) and latents.ndim == 4:
            sample_height, sample_width = latents.shape[-2:]
        height = sample_height * self.spatial_factor if height is None else height
        width = sample_width * self.spatial_factor if width is None else width
        self.check_inputs(
            batch_size,
            num_stages,
            num_inference_steps,
            guidance_scale,
            prior_guidance_scale,
            guidance_drop,
            guidance_interval,
            generator,
            height,
            width,
            latents,
            image,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device, dtype = self._execution_device, self.transformer.dtype
        class_ids = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_prompt)
        self._num_stages, self._num_timesteps, self._interrupt = num_stages, 0, False
        self._current_timestep = None

        # 2. A user's picture stands for the first stage's sample
        prior_latents, first_stage = None, 1
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
                self._guidance_scale = self._per_stage(guidance_scale, num_stages)[stage - 1]
            if stage == first_stage or isinstance(prior_guidance_scale, list):
                self._prior_guidance_scale = self._per_stage(prior_guidance_scale, num_stages)[stage - 1]
            prior_tokens = None
            if prior_latents is not None:
                prior_tokens = self.latent_embedder(prior_latents, return_dict=False)[0]
            noise = self.prepare_latents(batch_size, height, width, dtype, device, generator, latents)
            prior_latents = self.denoise(
                noise,
                class_ids,
                prior_tokens,
                self._per_stage(num_inference_steps, num_stages)[stage - 1],
                guidance_drop,
                self._per_stage(guidance_interval, num_stages)[stage - 1],
                generator,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
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
        return DoDPipelineOutput(images=images, stages=stages)
