"""Weights of LightningDiT, REPA-E, JiT, SiT, REPA, DiT and FiTv2 as the backbone of a DoD model."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .backbones import convert_backbone, convert_checkpoint

__getattr__, __all__ = lazy_names(__name__, {"backbones": ["convert_backbone", "convert_checkpoint"]})
