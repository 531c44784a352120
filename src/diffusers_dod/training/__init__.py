"""Training: the objective as pure functions, its parts, and the loop of `diffusers-dod train`."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .objective import (
        DiffusionExample,
        DoDLoss,
        count_prior_rows,
        ddpm_example,
        dod_loss,
        drop_labels,
        flow_example,
    )
    from .repa import REPAProjector, repa_loss

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "objective": [
            "DiffusionExample",
            "DoDLoss",
            "drop_labels",
            "count_prior_rows",
            "flow_example",
            "ddpm_example",
            "dod_loss",
        ],
        "repa": ["REPAProjector", "repa_loss"],
    },
)
