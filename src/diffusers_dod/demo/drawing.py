"""Draws with a shared DoD pipeline, stage by stage, and says which Python draws the same."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..data.images import read_image
from ..pipeline_dod import DoDPipeline
from ..viz.codes import stage_code_maps


@dataclass
class Drawing:
    """What to draw. Lists have one entry per stage, also for the stage 1 that a picture replaces.

    Args:
        class_id (`int`, *optional*): `None` is no class.
        picture (`str`, *optional*): path of the user's own picture, the prior of stage 2.
        prior_source (`str`, *optional*): the pipeline's argument.
    """

    class_id: int | None
    seed: int
    num_inference_steps: list[int]
    guidance_scale: list[float]
    picture: str | None = None
    prior_source: str | None = None

    @property
    def stages(self) -> range:
        """The numbers of the stages that run."""
        return range(1 if self.picture is None else 2, len(self.num_inference_steps) + 1)

    def arguments(self) -> dict:
        """The pipeline's arguments that are plain values."""
        return {
            "class_labels": self.class_id,
            "num_stages": len(self.num_inference_steps),
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            **({} if self.prior_source is None else {"prior_source": self.prior_source}),
        }

    def code(self, model: str, class_name: str, device: str) -> str:
        """Python that draws the same in a process of its own, and saves every stage."""
        lines = ["import torch"]
        if self.picture is not None:
            lines.append("from PIL import Image")
        lines += ["", "from diffusers_dod import DoDPipeline", ""]
        lines += [f"pipe = DoDPipeline.from_pretrained({model!r})" + ("" if device == "cpu" else f".to({device!r})")]
        lines.append("stages = pipe(")
        for name, value in self.arguments().items():
            lines.append(f"    {name}={value!r}," + (f"  # {class_name!r}" if name == "class_labels" else ""))
        if self.picture is not None:
            lines.append(f"    image=Image.open({Path(self.picture).name!r}),  # in the place of stage 1")
        lines += [f"    generator=torch.Generator().manual_seed({self.seed}),", "    return_stages=True,", ").stages"]
        lines.append(f"for number, images in enumerate(stages, start={self.stages.start}):")
        lines.append('    images[0].save(f"stage-{number}.png")')
        return "\n".join(lines)


@dataclass
class Progress:
    """A step of a stage was taken; `fraction` of the whole drawing is done."""

    stage: int
    fraction: float


@dataclass
class Finished:
    """A stage's picture is there. Stage 1 may be the user's own, as the model sees it.

    `code_maps` holds the maps of all stages so far, since they share their colours.
    """

    stage: int
    image: Image.Image
    code_maps: list[Image.Image]


# A picture of 50 megapixels is 200 MB for Pillow, and the memory of a thread stays with it: one thread reads them all.
READER = ThreadPoolExecutor(1, thread_name_prefix="read-picture")


def open_picture(path: str, largest: int | None = None) -> Image.Image:
    """Reads a user's picture as the pipeline and the training do.

    Args:
        path (`str`): where the server keeps it.
        largest (`int`, *optional*): side in pixels to which the longer one is shrunk.

    Raises:
        ValueError: for what is no picture, too large, too narrow, or of an unusual mode; it says what to do.
    """

    def read() -> Image.Image:
        picture = read_image({"path": path, "bytes": None})
        if largest is not None:
            picture.thumbnail((largest, largest))
        return picture

    try:
        return READER.submit(read).result()
    except ValueError as error:
        # The server's folders are nobody's business.
        raise ValueError(f"{str(error).replace(path, Path(path).name)}: try another picture.") from None


def private_pipeline(pipe: DoDPipeline) -> DoDPipeline:
    """A pipeline that shares the weights and nothing else: the scheduler and the interrupt flag change while it draws."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own = DoDPipeline(**{**pipe.components, "scheduler": scheduler}, id2label=pipe.config.id2label)
    own.set_progress_bar_config(disable=True)
    return own


def draw(shared_pipe: DoDPipeline, drawing: Drawing) -> Iterator[Progress | Finished]:
    """Draws and tells of every step and every stage as it ends; closing the iterator ends the drawing.

    Raises:
        ValueError: for a bad picture and for settings that the pipeline refuses.
    """
    picture = None if drawing.picture is None else open_picture(drawing.picture)
    pipe, stages = private_pipeline(shared_pipe), []
    events: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def finish(stage: int, latents: torch.Tensor) -> None:
        stages.append(latents)
        maps = [maps[0] for maps in stage_code_maps(pipe, stages)]
        (image,) = pipe.decode(latents, "pil")
        events.put(Finished(stage, image, maps))

    first_step = 0

    def on_step_end(pipe: DoDPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        nonlocal first_step
        pipe._interrupt = stop.is_set()
        done, planned = step + 1 - first_step, pipe.num_timesteps - first_step
        fraction = (pipe.current_stage - drawing.stages.start + done / planned) / len(drawing.stages)
        events.put(Progress(pipe.current_stage, fraction))
        if done == planned and not pipe.interrupt:
            first_step = step + 1
            finish(pipe.current_stage, tensors["latents"])
        return {}

    @torch.no_grad()
    def work() -> None:
        try:
            if picture is not None:
                size = pipe.transformer.config.sample_size
                height, width = (size, size) if isinstance(size, int) else size
                size = (height * pipe.spatial_factor, width * pipe.spatial_factor)
                latents = pipe.prepare_image_latents(picture, 1, 1, *size, pipe.transformer.dtype, pipe.device)
                finish(1, latents)
            pipe(
                **drawing.arguments(),
                image=picture,
                generator=torch.Generator().manual_seed(drawing.seed),
                output_type="latent",  # every stage is decoded as it ends
                callback_on_step_end=on_step_end,
            )
            events.put(None)
        except Exception as error:  # for whoever reads the events
            events.put(error)

    # The pipeline's call returns when all stages are done; in a thread it can tell of each before.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stop.set()
        thread.join()
