"""Pictures of what a DoD model does: its stages, what changes between them, what the embedder reads, how training went.

python -m diffusers_dod.viz --model FOLDER --output_dir pictures
"""

from .codes import code_maps, stage_code_maps
from .curves import plot_curves, read_scalars
from .grids import stage_differences, stage_grid


__all__ = ["code_maps", "plot_curves", "read_scalars", "stage_code_maps", "stage_differences", "stage_grid"]
