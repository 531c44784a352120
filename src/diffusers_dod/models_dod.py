"""Both models, as one file of a repository's code, and the one class that diffusers' `AutoModel` may take for either."""

import os
from typing import Any

from diffusers.models.modeling_utils import ModelMixin  # diffusers looks for it beside the models

from .latent_embedder_dod import DoDLatentEmbedder
from .transformer_dod import DoDTransformer2DModel


class DoDModel:
    """`from_pretrained` of either model: the index of a repository can name one class for `AutoModel`, not one for each."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ModelMixin:
        """The model whose class the folder's `config.json` names; arguments as of [`ModelMixin.from_pretrained`]."""
        config = DoDTransformer2DModel.load_config(pretrained_model_name_or_path, **kwargs)
        is_embedder = config["_class_name"] == DoDLatentEmbedder.__name__
        model_class = DoDLatentEmbedder if is_embedder else DoDTransformer2DModel
        return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
