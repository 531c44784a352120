"""Pictures of a DoD model: its stages, what changes between them, what the embedder extracts, how training went."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .codes import code_maps, stage_code_maps
    from .curves import plot_curves, read_scalars
    from .grids import stage_differences, stage_grid

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "codes": ["code_maps", "stage_code_maps"],
        "curves": ["plot_curves", "read_scalars"],
        "grids": ["stage_differences", "stage_grid"],
    },
)
