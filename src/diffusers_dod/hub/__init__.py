"""The Hub: what is wrong with a saved pipeline, its card, and its push in one commit."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .background import BackgroundPush
    from .check import check_folder, find_stage_grid
    from .push import PushFailed, collect_upload, push_folder, push_pipeline

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "background": ["BackgroundPush"],
        "check": ["check_folder", "find_stage_grid"],
        "push": ["PushFailed", "collect_upload", "push_folder", "push_pipeline"],
    },
)
