"""Random numbers that follow from the seed, the step and the position of a row in the global batch.

Nothing depends on which process draws them or on what was drawn before, so a step is the same however its batch is
spread over processes and accumulation, and a resumed run needs no memory of the one before.
"""

from collections.abc import Iterable

import numpy as np
import torch


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for what is drawn at once for all rows of a step, and then sliced."""
    return torch.Generator().manual_seed(_seed(seed, step))


def row_generators(
    seed: int, step: int, rows: Iterable[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One generator a row, for `diffusers.utils.torch_utils.randn_tensor` and everything else that takes a list.

    Args:
        seed (`int`): seed of the run.
        step (`int`): step of the run.
        rows (iterable of `int`): positions in the global batch.
        device (`torch.device`): where the numbers are drawn; kinds of devices draw different ones.
    """
    # One more than the position: entropy that ends in a zero is the entropy without it.
    return [torch.Generator(device).manual_seed(_seed(seed, step, 1 + int(row))) for row in rows]
