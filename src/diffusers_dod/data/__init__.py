"""Images and cached latents: reading, ordering, batching, caching."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .cache import CachedLatents, sample_posterior, select_flip
    from .cache_writing import LatentCacheWriter, cache_settings
    from .features import REPAEncoder
    from .images import center_crop, collate_images, inspect_images, load_labelled_images, read_image

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "cache": ["CachedLatents", "sample_posterior", "select_flip"],
        "cache_writing": ["LatentCacheWriter", "cache_settings"],
        "features": ["REPAEncoder"],
        "images": ["center_crop", "collate_images", "inspect_images", "load_labelled_images", "read_image"],
    },
)
