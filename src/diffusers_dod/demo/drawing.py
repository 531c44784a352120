"""Draws with a shared DoD pipeline and reports codes and stages as they are done."""

import copy
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from ..pipeline_dod import DoDPipeline
from .codes import code_grid, generate_codes, latent_size, rounded
from .uploads import open_picture


@dataclass(frozen=True)
class Drawing:
    """What to draw. Lists have one entry per stage, also for the stage 1 that a picture replaces.

    Args:
        class_id (`int`, *optional*): `None` is no class.
        seed (`int`): of the first sample; each further sample has the next number.
        num_samples (`int`): samples that are drawn at once.
        num_inference_steps (`list` of `int`): the pipeline's argument.
        guidance_scale (`list` of `float`, *optional*): the pipeline's argument; `None` where it has a guider.
        start (`str`): what the first stage follows: `"codes"`, nothing (`"stage"`) or a `"picture"` in the place of stage 1.
        same_codes (`bool`): all samples take the codes of the first one, from the code model.
        code_guidance_scale (`float`): class guidance of the code model.
        picture (`str`, *optional*): path of the user's own picture.
        codes (`torch.Tensor`, *optional*): codes to start from, instead of those of the code model.
        noise_before (`tuple` of `int`, *optional*):
            Shape of the noise that each sample's generator gave before, when the codes were drawn. It is drawn again and not
            used, so that changed codes meet the same noise.
    """

    class_id: int | None
    seed: int
    num_samples: int
    num_inference_steps: list[int]
    guidance_scale: list[float] | None
    start: str = "stage"
    same_codes: bool = False
    code_guidance_scale: float = 1.0
    picture: str | None = None
    codes: torch.Tensor | None = None
    noise_before: tuple[int, ...] | None = None

    @property
    def num_stages(self) -> int:
        return len(self.num_inference_steps)

    @property
    def first_stage(self) -> int:
        """The first stage that runs."""
        return 2 if self.start == "picture" else 1

    @property
    def first_stage_with_prior(self) -> int:
        return 1 if self.start == "codes" else 2

    @property
    def num_phases(self) -> int:
        """Denoising runs: the code model's, if any, and the stages'."""
        draws_codes = self.start == "codes" and self.codes is None
        return draws_codes + self.num_stages + 1 - self.first_stage

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_samples)

    def arguments(self) -> dict:
        """The pipeline's arguments that are plain values."""
        draws_codes = self.start == "codes" and self.codes is None
        return {
            "class_labels": self.class_id,
            **({} if self.num_samples == 1 else {"num_images_per_prompt": self.num_samples}),
            "num_stages": self.num_stages,
            "num_inference_steps": self.num_inference_steps,
            **({} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}),
            **({"prior_source": "stage"} if self.start == "stage" else {}),
            **({"code_guidance_scale": self.code_guidance_scale} if draws_codes else {}),
        }

    def from_codes(self, pipe: DoDPipeline, codes: torch.Tensor) -> "Drawing":
        """The same samples, of codes that are given."""
        noise_before = self.noise_before
        if self.codes is None and self.start == "codes":
            noise_before = (pipe.latent_embedder.config.bottleneck_dim, *code_grid(pipe))
        elif self.codes is None and self.start == "stage":
            noise_before = (pipe.transformer.config.in_channels, *latent_size(pipe))
        skipped = self.first_stage_with_prior - 1
        return replace(
            self,
            num_inference_steps=self.num_inference_steps[skipped:],
            guidance_scale=None if self.guidance_scale is None else self.guidance_scale[skipped:],
            start="codes",
            same_codes=False,
            picture=None,
            codes=rounded(codes),
            noise_before=noise_before,
        )


@dataclass
class Progress:
    """A step of a stage was taken; stage 0 is the codes. `fraction` of the whole drawing is done."""

    stage: int
    fraction: float


@dataclass
class Codes:
    """What the first stage with a prior sees, `(samples, rows * columns, bottleneck_dim)`."""

    codes: torch.Tensor


@dataclass
class Finished:
    """The pictures of a stage, one per sample. Those of stage 1 may be the user's own, as the model sees it."""

    stage: int
    images: list[Image.Image]


def private_pipeline(pipe: DoDPipeline) -> DoDPipeline:
    """A pipeline that shares the weights and nothing else: schedulers, guider and interrupt flag change while it draws."""
    schedulers = {"scheduler": pipe.scheduler, "code_scheduler": pipe.code_scheduler}
    copies = {name: type(part).from_config(part.config) for name, part in schedulers.items() if part is not None}
    private = DoDPipeline.from_pipe(pipe, **copies, guider=copy.deepcopy(pipe.guider))
    private.set_progress_bar_config(disable=True)
    return private


def draw(shared_pipe: DoDPipeline, drawing: Drawing) -> Iterator[Progress | Codes | Finished]:
    """Draws, and reports every step, the codes and every stage when they are done; closing the iterator ends the drawing.

    Raises:
        ValueError: for a bad picture and for settings that the pipeline refuses.
    """
    picture = None if drawing.picture is None else open_picture(drawing.picture)
    pipe = private_pipeline(shared_pipe)
    events: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()
    phase, first_step = 0, 0

    def finish(stage: int, latents: torch.Tensor) -> None:
        if stage + 1 == drawing.first_stage_with_prior <= drawing.num_stages and drawing.start != "codes":
            events.put(Codes(pipe.latent_embedder.encode(latents)))
        images: Any = pipe.decode(latents, "pil")
        events.put(Finished(stage, images))

    def on_step_end(pipe: DoDPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        nonlocal phase, first_step
        pipe._interrupt = stop.is_set()
        done, planned = step + 1 - first_step, pipe.num_timesteps - first_step
        events.put(Progress(pipe.current_stage, (phase + done / planned) / drawing.num_phases))
        if done == planned and not pipe.interrupt:
            # The pipeline counts the steps of its stages, not those of the codes that it is given.
            phase, first_step = phase + 1, step + 1 if pipe.current_stage else 0
            if pipe.current_stage:
                finish(pipe.current_stage, tensors["latents"])
        return {}

    def choose_codes(generators: list[torch.Generator]) -> torch.Tensor | None:
        if drawing.codes is not None:
            if drawing.noise_before is not None:
                for generator in generators:
                    torch.randn(drawing.noise_before, generator=generator)
            return drawing.codes
        if drawing.start != "codes":
            return None
        class_ids = [drawing.class_id] * drawing.num_samples
        scale = drawing.code_guidance_scale
        codes = generate_codes(pipe, class_ids, generators, guidance_scale=scale, callback_on_step_end=on_step_end)
        return rounded(codes[:1]).expand_as(codes) if drawing.same_codes else codes

    @torch.no_grad()
    def work() -> None:
        try:
            generators = [torch.Generator().manual_seed(seed) for seed in drawing.seeds]
            if (codes := choose_codes(generators)) is not None:
                events.put(Codes(codes))
            if picture is not None:
                height, width = (side * pipe.spatial_factor for side in latent_size(pipe))
                number = drawing.num_samples
                dtype = pipe.transformer.dtype
                finish(1, pipe.prepare_image_latents(picture, number, number, height, width, dtype, pipe.device))
            pipe(
                **drawing.arguments(),
                image=picture,
                codes=codes,
                generator=generators,
                output_type="latent",  # every stage is decoded as it ends
                callback_on_step_end=on_step_end,
            )
            events.put(None)
        except Exception as error:  # for whoever reads the events
            events.put(error)

    # The pipeline's call returns when all stages are done; in a thread it can report each before.
    thread = threading.Thread(target=work, name="draw", daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stop.set()
        thread.join()
