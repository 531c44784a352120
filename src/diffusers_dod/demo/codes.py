"""Codes that the page draws, mixes and paints on, `(samples, rows * columns, bottleneck_dim)`."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..pipeline_dod import DoDPipeline
from ..viz.codes import code_maps


DECIMALS = 4  # as the page's Python has them, so that it draws exactly the same
NUM_REFERENCES = 128


def latent_size(pipe: DoDPipeline) -> tuple[int, int]:
    """Rows and columns of the latents that the model was trained on."""
    size = pipe.transformer.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def code_grid(pipe: DoDPipeline) -> tuple[int, int]:
    """Rows and columns of the codes."""
    return pipe.latent_embedder.code_grid(*latent_size(pipe))


def rounded(codes: torch.Tensor) -> torch.Tensor:
    """Codes with few decimals, each the nearest float to its decimal number."""
    numbers = [[[round(x, DECIMALS) for x in code] for code in sample] for sample in codes.tolist()]
    return torch.tensor(numbers, dtype=torch.float32)


@torch.no_grad()
def generate_codes(
    pipe: DoDPipeline, class_ids: Sequence[int | None], generators: list[torch.Generator], **options: Any
) -> torch.Tensor:
    """Codes of the code model by the pipeline's default settings.

    Args:
        pipe ([`DoDPipeline`]): a pipeline with a code model that nobody else uses meanwhile.
        class_ids: one per sample; `None` is no class.
        generators: one per sample.
        options: arguments of [`DoDPipeline.generate_codes`].
    """
    labels = torch.tensor(pipe.prepare_class_labels(list(class_ids)), device=pipe.device)
    height, width = (side * pipe.spatial_factor for side in latent_size(pipe))
    return pipe.generate_codes(labels, height, width, generator=generators, **options)


def reference_codes(pipe: DoDPipeline) -> torch.Tensor | None:
    """Codes of all classes, which fix what the colours of a map mean; `None` without a code model."""
    if pipe.code_transformer is None:
        return None
    num_classes = pipe.transformer.config.num_classes
    class_ids = [i % num_classes if num_classes else None for i in range(NUM_REFERENCES)]
    return generate_codes(pipe, class_ids, [torch.Generator().manual_seed(i) for i in range(NUM_REFERENCES)])


def colour_maps(pipe: DoDPipeline, codes: torch.Tensor, reference: torch.Tensor | None) -> list[Image.Image]:
    """One map per sample, whose colours mean the same as in other maps with the same reference."""
    everything = codes if reference is None else torch.cat([codes.to(reference), reference])
    return code_maps(everything, code_grid(pipe))[: len(codes)]


def check_path(codes: torch.Tensor, path: object) -> list[tuple[int, int]]:
    """The cells of a stroke as the browser sent them: `[sample, cell]` each.

    Raises:
        ValueError: if there is no such cell.
    """
    samples, cells, _ = codes.shape
    if not isinstance(path, list) or not path or len(path) > samples * cells:
        raise ValueError("A stroke is a list of cells.")
    for place in path:
        is_pair = isinstance(place, list) and len(place) == 2 and all(type(number) is int for number in place)
        if not is_pair or not 0 <= place[0] < samples or not 0 <= place[1] < cells:
            raise ValueError(f"There is no cell {place!r}.")
    return [(sample, cell) for sample, cell in path]


def paint(codes: torch.Tensor, path: list[tuple[int, int]]) -> torch.Tensor:
    """Gives the first cell's code to all other cells of a stroke."""
    painted, source = codes.clone(), codes[path[0]]
    for place in path[1:]:
        painted[place] = source
    return painted
