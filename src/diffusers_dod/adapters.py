"""LoRA adapters of the transformer, in diffusers' form or in peft's own."""

import os
from pathlib import Path
from typing import Any

from diffusers.loaders import SanaLoraLoaderMixin


PEFT_PREFIX = "base_model.model."
# Of peft's configuration, what diffusers makes an adapter of
PEFT_SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")


# The Sana mixin is the plainest of diffusers' LoRA loaders: a transformer's adapters and nothing model-specific.
class DoDLoraLoaderMixin(SanaLoraLoaderMixin):
    """`load_lora_weights` and its kin, which also read what peft's `save_pretrained` wrote of the transformer."""

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """The tensors of an adapter, and its settings where `return_lora_metadata` asks for them.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A folder, a file or a repository, with `pytorch_lora_weights.safetensors` of diffusers, or peft's
                `adapter_model.safetensors` beside its `adapter_config.json`; or the tensors.
            kwargs: of the loader of diffusers, such as `weight_name`, `subfolder`, `revision` and `token`.
        """
        source, with_settings = pretrained_model_name_or_path_or_dict, kwargs.pop("return_lora_metadata", False)
        state, settings = super().lora_state_dict(
            source, return_lora_metadata=True, **{"use_safetensors": True} | kwargs
        )
        if any(key.startswith(PEFT_PREFIX) for key in state):
            state = {f"transformer.{key.removeprefix(PEFT_PREFIX)}": tensor for key, tensor in state.items()}
            if not isinstance(source, dict):
                from peft import LoraConfig  # an extra of diffusers' loaders

                folder = Path(source).parent if os.path.isfile(source) else source
                names = ("subfolder", "revision", "cache_dir", "token")
                found = LoraConfig.from_pretrained(str(folder), **{name: kwargs.get(name) for name in names}).to_dict()
                settings = {f"transformer.{name}": found[name] for name in PEFT_SETTINGS}
        return (state, settings) if with_settings else state
