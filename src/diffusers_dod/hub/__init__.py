"""The Hub: what is wrong with a saved pipeline, its card, and its push in one commit."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .push import BackgroundPush, check_folder, collect_upload, find_stage_grid, push_folder, push_pipeline

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "push": [
            "check_folder",
            "push_folder",
            "push_pipeline",
            "BackgroundPush",
            "collect_upload",
            "find_stage_grid",
        ],
    },
)
