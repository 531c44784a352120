"""The latent embedder's codes as colours."""

import torch
from PIL import Image

from ..pipeline_dod import DoDPipeline


SPREAD = 2.0  # standard deviations from the mean to black or full colour


def code_maps(codes: torch.Tensor, grid: tuple[int, int]) -> list[Image.Image]:
    """Small pictures of codes, one pixel per token: red, green and blue are their first three principal components.

    The components are of all samples together, so a colour means the same in all maps of one call. Each is scaled by its
    own standard deviation; one that the codes do not have stays at half.

    Args:
        codes (`torch.Tensor`): the embedder's `codes`, `(samples, rows * columns, channels)`.
        grid (pair of `int`): rows and columns.

    Returns:
        one `PIL.Image.Image` of `columns` x `rows` pixels per sample.
    """
    rows, columns = grid
    values = codes.detach().double().cpu().flatten(0, 1)
    centred = values - values.mean(dim=0)
    # The eigenvectors of the covariance, and not torch.pca_lowrank, which is random.
    variances, components = torch.linalg.eigh(centred.T @ centred / len(centred))
    variances, components = variances.flip(0)[:3], components.flip(1)[:, :3]
    # An eigenvector's sign is free: its largest entry shall be positive.
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    projected = centred @ (components * largest.sign())
    # What is left of a component that the codes do not have is rounding.
    present = variances > 1e-12 * values.square().mean()
    scaled = torch.where(present, projected / variances.clamp(min=1e-300).sqrt(), 0.0)

    colours = torch.full((len(values), 3), 0.5, dtype=torch.double)
    colours[:, : scaled.shape[1]] += scaled / (2 * SPREAD)
    pixels = (colours.clamp(0, 1) * 255).round().byte().unflatten(0, (len(codes), rows, columns))
    return [Image.fromarray(array) for array in pixels.numpy()]


@torch.no_grad()
def stage_code_maps(pipe: DoDPipeline, stages: list[torch.Tensor]) -> list[list[Image.Image]]:
    """What the pipeline's embedder extracts from each stage, all that the next stage receives from it.

    Args:
        pipe ([`DoDPipeline`]): the pipeline that drew the samples.
        stages (`list` of `torch.Tensor`):
            Latents by stage, `(samples, channels, height, width)` each: an output's `stages` with
            `output_type="latent"` and `return_stages=True`.

    Returns:
        maps of [`code_maps`] by stage and sample; colours mean the same in all of them.
    """
    latents = torch.cat(stages)
    patch_size = pipe.latent_embedder.config.patch_size
    grid = (latents.shape[-2] // patch_size, latents.shape[-1] // patch_size)
    maps = iter(code_maps(pipe.latent_embedder.encode(latents), grid))
    return [[next(maps) for _ in stage] for stage in stages]
