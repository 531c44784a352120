"""What the page shows of a pipeline: its classes, the first picture, and the results of drawings."""

import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..arguments import check_count, check_numbers
from ..pipeline_dod import CODES_GUIDANCE, FIRST_GUIDANCE, LATER_GUIDANCE, DoDPipeline
from .codes import colour_maps, generate_codes, reference_codes
from .drawing import Codes, Drawing, Finished, draw, private_pipeline
from .rendering import samples_html
from .snippet import python_code


MAX_STAGES = 4
AT_ONCE = 2  # drawings, each with a pipeline of its own (see `private_pipeline`); more only slow each other
MAX_STEPS_IN_ALL = 600  # of one drawing, all stages of all samples, so that nobody waits long for another's
NUM_STEPS = 30  # the pipeline's default
NO_CLASS = -1  # a dropdown's value cannot be None


@dataclass
class Result:
    """What a page shows. `unmixed` are the codes before they were mixed, so that another share starts from them again."""

    drawing: Drawing
    html: str
    code: str
    codes: torch.Tensor | None = None
    unmixed: torch.Tensor | None = None


def class_choices(pipe: DoDPipeline) -> list[tuple[str, int]]:
    """Names and ids of the classes; a name that several classes have is followed by the id."""
    names = pipe.config.id2label or {}
    ids = range(pipe.transformer.config.num_classes)
    short = [textwrap.shorten(names.get(str(i), f"class {i}"), 60, placeholder="…") for i in ids]
    count = Counter(short)
    return [("no class", NO_CLASS)] + [
        (f"{name} ({i})" if count[name] > 1 else name, i) for i, name in zip(ids, short)
    ]


def default_settings(start: str) -> tuple[int, list[float]]:
    """Stages, and guidance of each that may be, of the pipeline's default call."""
    first = CODES_GUIDANCE if start == "codes" else FIRST_GUIDANCE
    return 1 if start == "codes" else 2, [first] + [LATER_GUIDANCE] * (MAX_STAGES - 1)


class Studio:
    """Draws for all users of a pipeline; `model` is the name by which the Python that they see loads it."""

    def __init__(self, pipe: DoDPipeline, model: str):
        self.pipe, self.model = pipe, model
        self.class_names = {value: name for name, value in class_choices(pipe)}
        self.free = threading.Semaphore(AT_ONCE)
        self.reference = reference_codes(private_pipeline(pipe))

    def results(self, drawing: Drawing, unmixed: torch.Tensor | None = None) -> Iterator[tuple[str, float] | Result]:
        """The drawing's progress, and its result as far as it is after every stage, once fewer than `AT_ONCE` are drawn.

        Raises:
            ValueError: for settings that are refused.
        """
        check_count("num_samples", drawing.num_samples)
        check_numbers(code_guidance_scale=drawing.code_guidance_scale)
        if self.pipe.guider is not None:  # which has a scale of its own
            drawing = replace(drawing, guidance_scale=None)
        steps = sum(steps or 0 for steps in drawing.num_inference_steps[drawing.first_stage - 1 :])
        if steps * drawing.num_samples > MAX_STEPS_IN_ALL:
            raise ValueError(f"A drawing takes at most {MAX_STEPS_IN_ALL} steps of all stages and samples together.")
        while not self.free.acquire(timeout=0.2):
            yield "Waiting for others", 0.0
        try:
            yield from self.follow(drawing, unmixed)
        finally:
            self.free.release()

    def follow(self, drawing: Drawing, unmixed: torch.Tensor | None) -> Iterator[tuple[str, float] | Result]:
        codes, maps, stages = None, [], {}
        for event in draw(self.pipe, drawing):
            if isinstance(event, Codes):
                codes, maps = event.codes.cpu(), colour_maps(self.pipe, event.codes, self.reference)
            elif isinstance(event, Finished):
                stages[event.stage] = event.images
                # Codes of the first sample cannot be asked of the pipeline for all samples: the Python has them.
                copied = drawing if codes is None or not drawing.same_codes else drawing.from_codes(self.pipe, codes)
                class_name = self.class_names[NO_CLASS if drawing.class_id is None else drawing.class_id]
                code = python_code(copied, self.model, class_name, self.pipe.device.type)
                before = codes if unmixed is None else unmixed
                yield Result(drawing, samples_html(drawing, maps, stages), code, codes, before)
            else:
                name = f"Stage {event.stage} of {drawing.num_stages}" if event.stage else "Codes"
                yield name, event.fraction

    def first(self) -> Result:
        """What a page shows when it opens: its default settings for the first class, seed 0."""
        start = "stage" if self.pipe.code_transformer is None else "codes"
        num_stages, guidance = default_settings(start)
        class_id = 0 if self.pipe.transformer.config.num_classes else None
        steps, scales = [NUM_STEPS] * num_stages, guidance[:num_stages]
        drawing = Drawing(
            class_id, 0, 1, steps, scales, start, code_guidance_scale=self.pipe.config.code_guidance_scale
        )
        *_, result = (each for each in self.results(drawing) if isinstance(each, Result))
        return result

    def new_codes(self, class_id: int | None, seeds: range, guidance_scale: float) -> torch.Tensor:
        if self.pipe.code_transformer is None:
            raise ValueError("This model has no code model that could draw codes.")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        class_ids = [class_id] * len(seeds)
        return generate_codes(private_pipeline(self.pipe), class_ids, generators, guidance_scale=guidance_scale).cpu()
