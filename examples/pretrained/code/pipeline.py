"""The DoD pipeline: class labels to images in stages, each later stage guided by the sample of the one before."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

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
"""The arguments of calls and constructors: each checked once, with the cure in the message."""

import math
from numbers import Integral
from typing import Any

import numpy as np
import torch


# Of counts and sizes: far above what fits a machine, and small enough that memory ends before a library's integers do.
LARGEST = 2**24


def shown(value: Any) -> str:
    """A value as a message shows it: one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer from `least` to `LARGEST`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= LARGEST


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool) and abs(int(value)) < 2**63  # torch's largest
    return isinstance(value, (float, np.floating)) and math.isfinite(value)


def per_stage(value: Any, num_stages: int) -> list:
    """One entry per stage, of a list of them or of one value for all."""
    return value if isinstance(value, list) else [value] * num_stages


def check_count(name: str, value: Any, least: int = 1) -> None:
    if not is_count(value, least):
        raise ValueError(f"`{name}` is {shown(value)}; it must be an integer from {least} to {LARGEST}.")


def check_per_stage(num_stages: int, **values: Any) -> None:
    """Lists have one entry per stage."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) != num_stages:
            raise ValueError(
                f"`{name}` has {len(value)} entries for {num_stages} stages: pass one entry per stage, or one value."
            )


def check_steps(num_inference_steps: Any, num_stages: int) -> None:
    for steps in per_stage(num_inference_steps, num_stages):
        check_count("num_inference_steps", steps)


def check_scales(name: str, value: Any, num_stages: int, or_none: bool = False) -> None:
    """Finite numbers; with `or_none` also `None`."""
    for scale in per_stage(value, num_stages):
        if not is_finite(scale) and not (or_none and scale is None):
            raise ValueError(f"`{name}` is {shown(scale)}; every stage needs a finite number.")


def check_intervals(guidance_interval: Any, num_stages: int) -> None:
    for interval in per_stage(guidance_interval, num_stages):
        is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_finite, interval))
        if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` is {shown(interval)}; pass a tuple (start, stop) with 0 <= start <= stop <= 1, or a "
                "list of them, one per stage."
            )


def check_choice(name: str, value: Any, choices: tuple) -> None:
    # By type first: an array compares with each of its elements.
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"`{name}` is {shown(value)}; use {' or '.join(map(repr, choices))}.")


def check_switches(**switches: Any) -> None:
    for name, value in switches.items():
        if not isinstance(value, (int, np.bool_)):
            raise ValueError(f"`{name}` is {shown(value)}; it must be True or False.")


def check_sizes(least: int = 1, pair: tuple[str, ...] = ("sample_size",), **sizes: Any) -> None:
    """Integers of at least `least`, for constructors; those named in `pair` may also be a height and a width."""
    for name, value in sizes.items():
        is_pair = name in pair and isinstance(value, (tuple, list)) and len(value) == 2
        if not all(is_count(each, least) for each in (value if is_pair else (value,))):
            raise ValueError(f"`{name}` is {shown(value)}; it must be an integer from {least} to {LARGEST}.")


def check_numbers(above: float | None = None, **numbers: Any) -> None:
    """Finite numbers, above a bound if there is one, for constructors."""
    for name, value in numbers.items():
        if not is_finite(value) or (above is not None and value <= above):
            bound = "" if above is None else f" above {above:g}"
            raise ValueError(f"`{name}` is {shown(value)}; it must be a finite number{bound}.")


def check_list(name: str, values: Any, length: int, above: float = -math.inf) -> None:
    """So many finite numbers, above a bound if there is one."""
    is_list = isinstance(values, (list, tuple)) and len(values) == length
    if not is_list or not all(is_finite(value) and value > above for value in values):
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"`{name}` is {shown(values)}; it must be a list of {length} finite numbers{bound}.")


def check_shares(**shares: Any) -> None:
    """Numbers from 0 to 1."""
    for name, value in shares.items():
        if not is_finite(value) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` is {shown(value)}; it must be a number from 0 to 1.")


def check_instance(name: str, value: Any, *classes: type) -> None:
    if not isinstance(value, classes):
        wanted = " or ".join(each.__name__ for each in classes)
        raise TypeError(f"`{name}` is {shown(value)}; it must be a {wanted}.")


def check_size(height: Any, width: Any, multiple: int) -> None:
    """The size of an image that a VAE and patches must divide."""
    if not is_count(height) or not is_count(width) or height % multiple or width % multiple:
        raise ValueError(
            f"A {shown(height)}x{shown(width)} image does not fit: height and width must be multiples of {multiple}."
        )


def check_generator(generator: Any, batch_size: int) -> None:
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError("`generator` must be a torch.Generator or a list of them, such as torch.manual_seed(0).")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators for {batch_size} images: `generator` takes one, or one for each of the images."
        )


def check_callback(callback: Any, tensor_inputs: Any, known: list[str]) -> None:
    """`callback_on_step_end` and the names of what it is passed."""
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` is {shown(callback)}; it must be a function or None.")
    names = tensor_inputs if isinstance(tensor_inputs, (list, tuple)) else [tensor_inputs]
    if unknown := [name for name in names if not isinstance(name, str) or name not in known]:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` has {shown(unknown)}; pass a list of names from {known}."
        )


def changed_tensors(changed: Any, **tensors: torch.Tensor | None) -> list[Any]:
    """The tensors after a callback returned what it changed: a dict of some of them, each of the shape that it had."""
    if not isinstance(changed, dict):
        raise TypeError(
            f"`callback_on_step_end` returned {shown(changed)}; it must return a dict, {{}} where it changes nothing."
        )
    for name, before in tensors.items():
        after = changed.get(name, before)
        if after is not before and (before is None or not torch.is_tensor(after) or after.shape != before.shape):
            wanted = None if before is None else tuple(before.shape)
            raise ValueError(f"`callback_on_step_end` returned other `{name}` than a tensor of {wanted}.")
    return [changed.get(name, before) for name, before in tensors.items()]


def check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """A finite tensor of a shape."""
    if not torch.is_tensor(value) or tuple(value.shape) != shape:
        given = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"`{name}` is {given}; for these arguments it must be a tensor of {shape}.")
    if not value.is_floating_point() or value.is_meta or value.layout != torch.strided:
        raise ValueError(f"`{name}` is {value.dtype} on {value.device}; it must hold floating-point numbers.")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")


def check_rows(shape: tuple[int | None, ...], integers: bool = False, **tensors: Any) -> None:
    """Tensors of a shape, in which `None` is any size, by type alone: a GPU would have to wait for a look at the values."""
    for name, value in tensors.items():
        fits = torch.is_tensor(value) and len(value.shape) == len(shape)
        if not fits or any(size not in (None, given) for size, given in zip(shape, value.shape)):
            given = tuple(value.shape) if torch.is_tensor(value) else shown(value)
            wanted = f"({', '.join('any' if size is None else str(size) for size in shape)}{',' * (len(shape) == 1)})"
            raise ValueError(f"`{name}` is {given}; it must be a tensor of {wanted}.")
        is_integer = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        if is_integer != integers or value.is_complex() or value.dtype == torch.bool or value.layout != torch.strided:
            kind = "integers" if integers else "floating-point numbers"
            raise ValueError(f"`{name}` holds {value.dtype}; it must hold {kind}.")


def check_sample(sample: torch.Tensor, scheduler: Any) -> None:
    """A result is looked at: NaN would become a black picture without a word."""
    if not torch.isfinite(sample).all():
        raise ValueError(
            f"The sample holds NaN or infinite values: {type(scheduler).__name__} diverged. Lower `guidance_scale`, take more "
            "steps, leave out `use_karras_sigmas`, or use another scheduler; in float16, try bfloat16."
        )
"""Images to latents and back, through any of diffusers' image autoencoders, in the scale a diffusion model works in."""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor


def _normalizes_itself(vae: ModelMixin) -> bool:
    # AutoencoderRAE takes images in [0, 1] and applies its latent statistics and scaling within encode and decode.
    return "encoder_norm_mean" in vae.config


def vae_spatial_factor(vae: ModelMixin | None) -> int:
    """The autoencoder's downsampling factor: image height divided by latent height; 1 without an autoencoder."""
    if vae is None:
        return 1
    if _normalizes_itself(vae):
        return vae.config.patch_size
    blocks = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    return 2 ** (len(blocks) - 1)


def vae_latent_channels(vae: ModelMixin) -> int:
    """Channels of the autoencoder's latents."""
    return vae.config.encoder_hidden_size if _normalizes_itself(vae) else vae.config.latent_channels


def make_image_processor(vae: ModelMixin | None, transformer: Any) -> VaeImageProcessor:
    """What turns pictures into the autoencoder's input and its output into pictures, for a transformer of that config."""
    return VaeImageProcessor(
        vae_scale_factor=vae_spatial_factor(vae) * transformer.patch_size,
        vae_latent_channels=0,  # `prepare_image_latents` tells latents from pictures itself
        do_convert_rgb=vae is not None or transformer.in_channels == 3,
        do_convert_grayscale=vae is None and transformer.in_channels == 1,
    )


def _scale_shift(vae: ModelMixin, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """The pair (scale, shift) of `normalized = (latents - shift) * scale`."""
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return scale / std, mean
    return scale, config.get("shift_factor") or 0.0


def encode_posterior(vae: ModelMixin | None, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes images to the distribution of their normalized latents.

    Args:
        vae (`ModelMixin`, *optional*):
            `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC`, `AutoencoderRAE` or one that shares their interface;
            `None` is pixel space, where the images are the latents.
        images (`torch.Tensor`): `(batch, 3, height, width)` in [-1, 1].

    Returns:
        mean and standard deviation, each `(batch, channels, height/factor, width/factor)`; the deviation is `None` for
        an autoencoder without a posterior, whose latents are the mean.
    """
    if vae is None:
        return images, None
    images = images.to(vae.dtype)
    if _normalizes_itself(vae):
        return vae.encode(images / 2 + 0.5, return_dict=False)[0], None
    encoded = vae.encode(images, return_dict=False)[0]
    mean, std = (encoded, None) if torch.is_tensor(encoded) else (encoded.mean, encoded.std)
    scale, shift = _scale_shift(vae, mean)
    return (mean - shift) * scale, None if std is None else std * scale


def encode_images(
    vae: ModelMixin | None,
    images: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sample_posterior: bool = False,
) -> torch.Tensor:
    """Encodes images to normalized latents.

    Args:
        vae (`ModelMixin`, *optional*): as for [`encode_posterior`].
        images (`torch.Tensor`): as for [`encode_posterior`].
        generator (`torch.Generator` or a `list` of them, *optional*): for the posterior's sample.
        sample_posterior (`bool`, defaults to `False`): whether to draw from a posterior or to take its mode.

    Returns:
        `torch.Tensor`: `(batch, channels, height/factor, width/factor)`.
    """
    mean, std = encode_posterior(vae, images)
    if std is None or not sample_posterior:
        return mean
    return mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


def decode_latents(vae: ModelMixin | None, latents: torch.Tensor) -> torch.Tensor:
    """Decodes normalized latents, the inverse of [`encode_images`].

    Args:
        vae (`ModelMixin`, *optional*): as for [`encode_posterior`].
        latents (`torch.Tensor`): `(batch, channels, height, width)`.

    Returns:
        `torch.Tensor`: images, `(batch, 3, height*factor, width*factor)`, about [-1, 1].
    """
    if vae is None:
        return latents
    latents = latents.to(vae.dtype)
    if _normalizes_itself(vae):
        return vae.decode(latents, return_dict=False)[0] * 2 - 1
    scale, shift = _scale_shift(vae, latents)
    return vae.decode(latents / scale + shift, return_dict=False)[0]
"""Do these components and this scheduler fit each other? Functions of classes and configs alone."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from packaging.version import Version



# Of `from_pretrained`. diffusers 0.42 deprecates the older name, which is the only one before it.
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42.0.dev0") else "torch_dtype"
# By which entry of its config a model is known; its class may be that of a repository's own code.
TRANSFORMERS = ("transformer", "code_transformer", "weak_transformer")
KNOWN_BY = {"latent_embedder": "bottleneck_dim", **dict.fromkeys(TRANSFORMERS, "num_classes")}


def check_kinds(components: Mapping[str, Any]) -> None:
    """Whether each component is of its kind at all; `None` is one that is not loaded.

    Raises:
        TypeError: naming the component.
    """
    for name, component in components.items():
        if component is None:
            continue
        config: Any = getattr(component, "config", None)
        kind, fits = "a scheduler of diffusers", isinstance(config, Mapping)
        if "scheduler" in name:
            fits = fits and callable(getattr(component, "set_timesteps", None)) and hasattr(component, "step")
        elif name == "guider":
            kind, fits = "a guider of diffusers", isinstance(component, BaseGuidance)
        else:
            kind = "an autoencoder of diffusers" if name == "vae" else "a model of diffusers_dod of that name"
            fits = fits and isinstance(component, torch.nn.Module)
            fits = fits and (hasattr(component, "decode") if name == "vae" else KNOWN_BY[name] in config)
        if not fits:
            raise TypeError(f"`{name}` is {shown(component)}; it must be {kind}.")


def check_loaded(components: Mapping[str, Any]) -> None:
    """Whether all is there that a call needs.

    Raises:
        ValueError: naming the component that is `None`.
    """
    needed = ["transformer", "latent_embedder", "scheduler"]
    needed += ["code_scheduler"] if components["code_transformer"] is not None else []
    for name in needed:
        if components[name] is None:
            raise ValueError(f"`{name}` is None: this pipeline needs one to draw.")


def check_components(transformer: Any, latent_embedder: Any, vae: ModelMixin | None) -> None:
    """Compares the models that a pipeline is made of.

    Args:
        transformer, latent_embedder: configs of a [`DoDTransformer2DModel`] and a [`DoDLatentEmbedder`].
        vae (`ModelMixin`, *optional*): the autoencoder.

    Raises:
        ValueError: naming what differs.
    """
    width = transformer.num_attention_heads * transformer.attention_head_dim
    output_patch_size = latent_embedder.output_patch_size or latent_embedder.patch_size
    for what, embedder_value, transformer_value in (
        ("`output_dim`", latent_embedder.output_dim, width),
        ("`in_channels`", latent_embedder.in_channels, transformer.in_channels),
        ("`output_patch_size`", output_patch_size, transformer.patch_size),
    ):
        if embedder_value != transformer_value:
            raise ValueError(
                f"The latent embedder's {what} is {embedder_value} but the transformer needs {transformer_value}: "
                "load the embedder that was trained with this transformer."
            )
    if vae is not None and vae_latent_channels(vae) != transformer.in_channels:
        raise ValueError(
            f"The VAE's latents have {vae_latent_channels(vae)} channels but the transformer takes "
            f"{transformer.in_channels}: load the VAE that the transformer was trained on."
        )


def check_code_model(code_transformer: Any, transformer: Any, latent_embedder: Any) -> None:
    """Compares a model of codes with the models around it; all are configs.

    Raises:
        ValueError: naming what differs, or that the codes' statistics are missing.
    """
    channels = latent_embedder.bottleneck_dim
    for what, code_value, value in (
        ("`in_channels`", code_transformer.in_channels, channels),
        ("`out_channels`", code_transformer.out_channels or code_transformer.in_channels, channels),
        ("`num_classes`", code_transformer.num_classes, transformer.num_classes),
    ):
        if code_value != value:
            raise ValueError(
                f"The code model's {what} is {code_value} but the latent embedder and the transformer need {value}: load "
                "the code model that was trained with them."
            )
    if latent_embedder.codes_mean is None or latent_embedder.codes_std is None:
        raise ValueError(
            "The latent embedder's config has no `codes_mean` and `codes_std`, which a code model needs: load the embedder "
            "that was saved with the code model."
        )


def check_weak_model(weak_transformer: Any, transformer: Any) -> None:
    """Compares a weaker model for autoguidance with the model that it guides; both are configs.

    Raises:
        ValueError: naming what differs.
    """
    width, weak_width = (
        config.num_attention_heads * config.attention_head_dim for config in (transformer, weak_transformer)
    )
    for what, weak_value, value in (
        ("`in_channels`", weak_transformer.in_channels, transformer.in_channels),
        ("`patch_size`", weak_transformer.patch_size, transformer.patch_size),
        ("`num_classes`", weak_transformer.num_classes, transformer.num_classes),
        ("`prediction_type`", weak_transformer.prediction_type, transformer.prediction_type),
        ("width", weak_width, width),
    ):
        if weak_value != value:
            raise ValueError(
                f"The weak transformer's {what} is {weak_value} but the transformer's is {value}: they see the same latents, "
                "classes and prior tokens, so load an earlier checkpoint of it, or one of fewer layers."
            )


def check_code_grid(grid: tuple[int, int], patch_size: int, height: int, width: int) -> None:
    """Whether the code model's patches cut the codes of an image of that height and width.

    Raises:
        ValueError: with what to do.
    """
    if grid[0] % patch_size or grid[1] % patch_size:
        raise ValueError(
            f"A {height}x{width} image has {grid[0]}x{grid[1]} codes, which the code model's patch of {patch_size} does not "
            "divide: choose another size, pass `codes`, or `prior_source='stage'`."
        )


def scheduler_entries(scheduler: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a scheduler's config that its class reads.

    A config made by `from_config` also carries the entries of the scheduler that it was made of.
    """
    parameters = inspect.signature(scheduler).parameters
    return {key: value for key, value in config.items() if key in parameters}


def scheduler_reads(scheduler: type, config: Mapping[str, Any], cure: str) -> str:
    """What a scheduler takes for the model's output: `"flow"`, `"epsilon"`, `"v_prediction"` or `"sample"`.

    Args:
        scheduler (`type`): its class.
        config (mapping): its config.
        cure (`str`): what the message says to use instead.

    Raises:
        ValueError: if its config contradicts itself.
    """
    entries = scheduler_entries(scheduler, config)
    # The flow-matching schedulers have no such entry; the others say "flow_prediction" and need flow sigmas.
    prediction_type = entries.get("prediction_type", "flow_prediction")
    flow_sigmas = entries.get("use_flow_sigmas", "prediction_type" not in entries)
    reads = prediction_type.replace("flow_prediction", "flow")
    if flow_sigmas != (reads == "flow"):
        raise ValueError(
            f"{scheduler.__name__} has `use_flow_sigmas={flow_sigmas}` and `prediction_type={prediction_type!r}`, which "
            f"contradict each other: use {cure}."
        )
    return reads


def keeps_variance(scheduler: type, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler reads the second half of the output's channels as a learned variance."""
    return scheduler_entries(scheduler, config).get("variance_type") in ("learned", "learned_range")


# Schedulers of diffusers that have a `prediction_type` and are another model's own
OF_OTHER_MODELS = ("SCMScheduler", "HeliosScheduler", "HeliosDMDScheduler", "UnCLIPScheduler")
NOT_OF_SAMPLES = (
    "PNDMScheduler EDMEulerScheduler EDMDPMSolverMultistepScheduler EulerAncestralDiscreteScheduler ".split()
)
NOT_OF_SAMPLES += ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]
# Those of rectified flow, which have no `prediction_type`
FLOW_ONLY = ("FlowMatch", "LTXEulerAncestralRF")
OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def can_read(scheduler: type, predicts: str) -> bool:
    """Whether a scheduler can be made so that it samples from noise with a model of this prediction."""
    step = list(inspect.signature(getattr(scheduler, "step", lambda: None)).parameters.values())
    needs = [p.name for p in step if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if "Inverse" in scheduler.__name__ or needs != ["self", "model_output", "timestep", "sample"]:
        return False  # it goes from a sample to noise, or needs more than an image's denoising has
    names = inspect.signature(scheduler).parameters
    if "prediction_type" not in names:
        is_foreign = scheduler.__module__.split(".")[0] != "diffusers"
        return predicts == "flow" and (is_foreign or scheduler.__name__.startswith(FLOW_ONLY))
    if scheduler.__name__ in OF_OTHER_MODELS or (predicts == "sample" and scheduler.__name__ in NOT_OF_SAMPLES):
        return False
    return predicts != "flow" or "use_flow_sigmas" in names


def scheduler_cure(scheduler: type, config: Mapping[str, Any], transformer: Any, component: str = "scheduler") -> str:
    """The expression that makes a scheduler for this transformer, of the same class if that can be.

    Args:
        scheduler (`type`): class of the scheduler that does not fit.
        config (mapping): its config.
        transformer: config of the [`DoDTransformer2DModel`].
        component (`str`, defaults to `"scheduler"`): its name in the pipeline.
    """
    predicts = transformer.prediction_type or scheduler_entries(scheduler, config).get("prediction_type", "flow")
    predicts = predicts.replace("flow_prediction", "flow")
    if not can_read(scheduler, predicts):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler if predicts == "flow" else diffusers.DDIMScheduler
    names = inspect.signature(scheduler).parameters
    wanted: dict[str, Any] = {}
    if "prediction_type" in names:
        wanted["prediction_type"] = "flow_prediction" if predicts == "flow" else predicts
    if "use_flow_sigmas" in names:
        wanted["use_flow_sigmas"] = predicts == "flow"
        wanted |= dict.fromkeys(OTHER_SIGMAS, False) if predicts == "flow" else {}
    wanted["use_dynamic_shifting"] = False
    if keeps_variance(scheduler, config) and not _fits_variance(scheduler, transformer):
        wanted["variance_type"] = "fixed_small" if issubclass(scheduler, DDPMScheduler) else None
    # Only what is not so already; `from_config` takes the rest, or the class's own default, over.
    changes = [
        f"{name}={value!r}"
        for name, value in wanted.items()
        if name in names and config.get(name, names[name].default) != value
    ]
    return f"{scheduler.__name__}.from_config({', '.join([f'pipe.{component}.config', *changes])})"


def _fits_variance(scheduler: type, transformer: Any) -> bool:
    return issubclass(scheduler, DDPMScheduler) and transformer.out_channels == 2 * transformer.in_channels


def check_scheduler(
    scheduler: type, config: Mapping[str, Any], transformer: Any, component: str = "scheduler"
) -> None:
    """Compares a scheduler with the transformer's prediction.

    Args:
        scheduler (`type`): the scheduler's class.
        config (mapping): its config.
        transformer: config of the [`DoDTransformer2DModel`].
        component (`str`, defaults to `"scheduler"`): the scheduler's name in the pipeline.

    Raises:
        ValueError: with the expression that makes a scheduler that fits.
    """
    name, predicts = scheduler.__name__, transformer.prediction_type
    cure = f"`pipe.{component} = {scheduler_cure(scheduler, config, transformer, component)}`"
    reads = scheduler_reads(scheduler, config, cure)
    if not can_read(scheduler, reads):
        raise ValueError(
            f"{name} cannot sample with a model that predicts {predicts or reads!r}, however it is made: use {cure}."
        )
    if predicts not in (None, reads):
        never = "" if can_read(scheduler, predicts) else " and cannot be made to read that"
        raise ValueError(f"The transformer predicts {predicts!r} but {name} reads {reads!r}{never}: use {cure}.")
    if scheduler_entries(scheduler, config).get("use_dynamic_shifting"):
        raise ValueError(
            f"{name} has `use_dynamic_shifting=True`, for which it needs a `mu` that this pipeline does not give: use {cure}, "
            "which has a fixed `shift`."
        )
    if keeps_variance(scheduler, config) and not _fits_variance(scheduler, transformer):
        problem = "the transformer predicts none" if issubclass(scheduler, DDPMScheduler) else "does not use it"
        raise ValueError(f"{name} has `variance_type={config['variance_type']!r}` but {problem}: use {cure}.")
"""One run of a scheduler over a guided model, step by step; the pipeline and the modular blocks have the loop."""

import inspect

import torch
from diffusers import SchedulerMixin

"""Guidance: what the branches of a step see, and how their predictions become one.

A stage makes one of two: [`ScaleGuidance`], which is the pipeline's own, or [`GuiderGuidance`] around a guider of
diffusers. Either is called once per step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin



DEFAULT_INTERVAL = (0.25, 0.75)


class Branch(NamedTuple):
    """One prediction of a step: which model makes it, and of what."""

    transformer: ModelMixin
    class_labels: torch.Tensor
    prior_tokens: torch.Tensor | None


def changes_layers(guider: BaseGuidance) -> bool:
    """Whether a guider changes the model for some of its branches, which then cannot share a forward."""
    return type(guider).prepare_models is not BaseGuidance.prepare_models


class StageGuidance(ABC):
    """One run of a transformer over its steps, guided.

    Args:
        transformer (`ModelMixin`): what predicts.
        drop (`str`): what the second branch goes without: `"class"`, `"prior"`, `"both"` or `"nothing"`.
        weak_transformer (`ModelMixin`, *optional*): a weaker model, which makes the second branch.
    """

    def __init__(self, transformer: ModelMixin, drop: str, weak_transformer: ModelMixin | None = None):
        self.transformer, self.drop, self.weak_transformer = transformer, drop, weak_transformer
        self._num_branches: int | None = None
        self.reset_caches()

    @abstractmethod
    def __call__(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        step: int,
        num_steps: int,
        class_labels: torch.Tensor,
        prior_tokens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction of a step.

        Args:
            model_input (`torch.Tensor`): noisy latents as the model takes them, `(batch, channels, height, width)`.
            timestep (`torch.Tensor`): a scalar.
            step (`int`): step of this run, from 0.
            num_steps (`int`): steps of this run.
            class_labels (`torch.Tensor`): `(batch,)`.
            prior_tokens (`torch.Tensor`, *optional*): `(batch, tokens, width of the model)`.

        Returns:
            the guided prediction and, from a model that learned it, the first branch's variance, `(batch, 0, ...)` if not.
        """

    def reset_caches(self) -> None:
        """Empties the feature caches of the models, which remember the steps before."""
        for transformer in (self.transformer, self.weak_transformer):
            if transformer is not None and transformer.is_cache_enabled:
                transformer._reset_stateful_cache()

    def first_branch(self, class_labels: torch.Tensor, prior_tokens: torch.Tensor | None) -> Branch:
        """The model's, with all conditions."""
        return Branch(self.transformer, class_labels, prior_tokens)

    def second_branch(self, first: Branch) -> Branch:
        """The weaker model's if there is one, without the conditions that are dropped. No prior is a row of zeros."""
        class_labels, prior_tokens = first.class_labels, first.prior_tokens
        if self.drop in ("class", "both"):
            class_labels = torch.full_like(class_labels, self.transformer.config.num_classes)
        if self.drop in ("prior", "both") and prior_tokens is not None:
            prior_tokens = torch.zeros_like(prior_tokens)
        return Branch(self.weak_transformer or self.transformer, class_labels, prior_tokens)

    def predict(self, branches: list[Branch], model_input: torch.Tensor, timestep: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of all branches; neighbours of one model share a forward."""
        if self._num_branches not in (None, len(branches)):
            self.reset_caches()  # what a cache holds has the rows of the last step, which are not this step's
        self._num_branches = len(branches)
        outputs: list[torch.Tensor] = []
        for _, group in groupby(branches, key=lambda branch: id(branch.transformer)):
            outputs += forward(list(group), model_input, timestep)
        return outputs


def forward(branches: list[Branch], model_input: torch.Tensor, timestep: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of branches of the same model, in one forward."""
    transformer = branches[0].transformer
    class_labels = torch.cat([branch.class_labels for branch in branches])
    priors = [branch.prior_tokens for branch in branches if branch.prior_tokens is not None]
    with transformer.cache_context("denoise"):
        output = transformer(
            torch.cat([model_input] * len(branches)),
            timestep=timestep.expand(len(class_labels)),
            class_labels=class_labels,
            encoder_hidden_states=torch.cat(priors) if priors else None,
            return_dict=False,
        )[0]
    return list(output.chunk(len(branches)))


class ScaleGuidance(StageGuidance):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), with the prior as a second condition.

    With a scale of its own for the prior the branches are (class, prior), (null, prior) and (null, none), as InstructPix2Pix
    has them for text and image (Brooks et al. 2022, arXiv 2211.09800). With a weaker model it is autoguidance (Karras et
    al. 2024, arXiv 2406.02507).

    Args:
        transformer, drop, weak_transformer: as for [`StageGuidance`].
        scales (`Callable`): returns the scales of class and prior, in every step, because a callback may change them.
        interval (pair of `float`): the part of the steps that is guided.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        drop: str,
        scales: Callable[[], tuple[float, Any]],
        interval: tuple[float, float],
        weak_transformer: ModelMixin | None = None,
    ):
        super().__init__(transformer, drop, weak_transformer)
        self.scales, self.interval = scales, interval

    def __call__(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        step: int,
        num_steps: int,
        class_labels: torch.Tensor,
        prior_tokens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale, prior_scale = self.scales()
        start, stop = (fraction * num_steps for fraction in self.interval)
        branches = [self.first_branch(class_labels, prior_tokens)]
        if start <= step < stop:
            branches += self.other_branches(branches[0], scale, prior_scale)

        outputs = self.predict(branches, model_input, timestep)
        channels = model_input.shape[1]
        first, *others = (output[:, :channels] for output in outputs)
        variance = outputs[0][:, channels:]
        if not others:
            return first, variance
        if len(others) == 1:
            return others[0] + scale * (first - others[0]), variance
        prior_only, none = others
        return none + prior_scale * (prior_only - none) + scale * (first - prior_only), variance

    def other_branches(self, first: Branch, scale: float, prior_scale: Any) -> list[Branch]:
        """What a step within the interval needs beside the first branch."""
        prior_tokens = first.prior_tokens
        if prior_tokens is None:
            # Stage 1 has no prior to lose, so only the class can guide it, or a weaker model.
            loses = self.weak_transformer is not None or self.drop != "prior"
            return [self.second_branch(first)] if scale != 1.0 and loses else []
        if scale == 1.0 and prior_scale in (None, 1.0):
            return []
        if prior_scale is None:
            return [self.second_branch(first)]
        null = torch.full_like(first.class_labels, self.transformer.config.num_classes)
        return [
            Branch(self.transformer, null, prior_tokens),
            Branch(self.transformer, null, torch.zeros_like(prior_tokens)),
        ]


class GuiderGuidance(StageGuidance):
    """A guider of diffusers, which has scales and steps of its own, over the two branches.

    Args:
        transformer, drop, weak_transformer: as for [`StageGuidance`].
        guider (`BaseGuidance`): one that [`check_guider`] accepts.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        drop: str,
        guider: BaseGuidance,
        weak_transformer: ModelMixin | None = None,
    ):
        super().__init__(transformer, drop, weak_transformer)
        self.guider = guider

    def __call__(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        step: int,
        num_steps: int,
        class_labels: torch.Tensor,
        prior_tokens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        guider, channels = self.guider, model_input.shape[1]
        first = self.first_branch(class_labels, prior_tokens)
        pairs = zip(Branch._fields, zip(first, self.second_branch(first)))
        guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)
        batches = guider.prepare_inputs(dict(pairs))
        branches = [Branch(*(getattr(batch, name) for name in Branch._fields)) for batch in batches]

        if not changes_layers(guider):
            outputs = self.predict(branches, model_input, timestep)
        else:
            outputs = []
            for batch, branch in zip(batches, branches):
                guider.prepare_models(branch.transformer)
                try:
                    name = getattr(batch, guider._identifier_key)
                    if name.startswith("pred_cond") and not guider.is_conditional:
                        raise ValueError(
                            f"{type(guider).__name__} of this diffusers release changes its layers only beside guidance by the "
                            "class: give it a `guidance_scale` other than 1, and a `start` and `stop` around its other ones."
                        )
                    outputs += forward([branch], model_input, timestep)
                finally:
                    guider.cleanup_models(branch.transformer)
        for batch, output in zip(batches, outputs):
            batch.noise_pred = output[:, :channels]
        return guider(batches)[0], outputs[0][:, channels:]


def check_guidance(
    guider: Any,
    transformer: ModelMixin,
    weak_transformer: ModelMixin | None,
    guidance_scale: Any,
    prior_guidance_scale: Any,
    guidance_drop: str | None,
    guidance_interval: Any,
) -> None:
    """Compares a call's arguments for guidance with the components that guide; `None` is not given.

    Raises:
        ValueError: naming the argument, or why the guider cannot be used.
    """
    check_choice("guidance_drop", guidance_drop, ("class", "prior", "both", "nothing", None))
    if guider is None:
        if guidance_drop == "nothing" and weak_transformer is None:
            raise ValueError(
                "`guidance_drop` is 'nothing' but both branches are the same model's: pass 'class', 'prior' or 'both', or "
                "give the pipeline a `weak_transformer` or a guider that changes layers."
            )
        if weak_transformer is not None and prior_guidance_scale is not None:
            raise ValueError(
                "`prior_guidance_scale` has three branches and `weak_transformer` makes the second of two: leave one of "
                "them out."
            )
        return
    check_guider(guider, transformer)
    if weak_transformer is not None and changes_layers(guider):
        raise ValueError(
            f"{type(guider).__name__} makes a weaker model by changing layers, and `weak_transformer` is one: leave one of them "
            "out."
        )
    for name, value in (
        ("guidance_scale", guidance_scale),
        ("prior_guidance_scale", prior_guidance_scale),
        ("guidance_interval", guidance_interval),
    ):
        if value is not None:
            raise ValueError(
                f"`{name}` is given, but {type(guider).__name__} guides, with a scale, `start` and `stop` of its own: set them "
                "there, or `pipe.guider = None`."
            )


def check_guider(guider: Any, transformer: ModelMixin) -> None:
    """Whether a guider can guide a class-conditional model of images, found by trying it where diffusers does not say.

    Raises:
        ValueError: with what it needs instead.
    """
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"`guider` is {type(guider).__name__}; it must be one of diffusers' guiders, or None.")
    name = type(guider).__name__
    if "pred_cond_stg" in guider._input_predictions:
        raise ValueError(f"{name} guides by arguments of LTX-2's transformer, which a model of images does not have.")
    for argument in ("auto_guidance_config", "skip_layer_config", "seg_guidance_config"):
        for config in getattr(guider, argument, None) or []:
            if isinstance(config.indices, int):
                raise ValueError(
                    f"{name} has the layer {config.indices} where diffusers needs a list: make it with "
                    f"`{argument}` as a `{type(config).__name__}(indices=[{config.indices}])`, without its argument of layers."
                )
    if changes_layers(guider):
        if transformer.is_cache_enabled:
            raise ValueError(
                f"{name} changes layers, whose outputs a cache keeps: call `pipe.transformer.disable_cache()`."
            )
        guider.set_state(step=0, num_inference_steps=1, timestep=None)
        guider.prepare_models(transformer)
        if guider._count_prepared != 1:
            raise ValueError(f"{name} of this diffusers release does not count its branches, so it changes no layer.")
    guider.set_state(step=0, num_inference_steps=1, timestep=None)
    batches = guider.prepare_inputs({})
    for batch in batches:
        batch.noise_pred = torch.ones(1, transformer.config.in_channels, 8, 8)
    try:
        guider(batches)
    except RuntimeError as error:
        raise ValueError(f"{name} of this diffusers release cannot guide images: {error}") from error


class Denoising:
    """From standard normal noise to a sample.

    Args:
        scheduler (`SchedulerMixin`): starts anew, because multistep ones remember earlier predictions.
        noise (`torch.Tensor`): standard normal, `(batch, channels, height, width)`.
        num_inference_steps (`int`): steps of the scheduler.
        generator (`torch.Generator` or a `list` of them, *optional*): noise of schedulers that draw some in each step.

    Attributes:
        timesteps (`torch.Tensor`): of the steps; some schedulers have more of them than `num_inference_steps`.
        latents (`torch.Tensor`): the noise as the scheduler scales it, where the first step starts.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        noise: torch.Tensor,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it looks the first timestep up, for which a GPU must stop
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        # Only now, because a scheduler's noise scale may depend on its steps.
        self.latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        draws_noise = "generator" in inspect.signature(scheduler.step).parameters
        self._step_kwargs = {"generator": generator} if draws_noise else {}
        self._keeps_variance = keeps_variance(type(scheduler), scheduler.config)

    def step(
        self,
        index: int,
        latents: torch.Tensor,
        guidance: StageGuidance,
        class_ids: torch.Tensor,
        prior_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """The latents after step `index`, which starts from 0."""
        timestep, model_input = self.timesteps[index], latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(latents, timestep)
        prediction, variance = guidance(model_input, timestep, index, len(self.timesteps), class_ids, prior_tokens)
        if self._keeps_variance:
            prediction = torch.cat([prediction, variance], dim=1)
        return self.scheduler.step(prediction, timestep, latents, **self._step_kwargs, return_dict=False)[0]
"""Class labels of a call: ids, or names of `id2label` and their synonyms."""

import difflib
from typing import Any

import numpy as np
import torch



def text_labels(id2label: Any) -> dict[str, str] | None:
    """`id2label` with its ids as strings, which JSON makes of them; `None` if it is empty.

    Raises:
        ValueError: if it is no dict of ids to names.
    """
    if not isinstance(id2label, (dict, type(None))):
        raise ValueError(f"`id2label` is {shown(id2label)}; it must be a dict of class ids to names.")
    for class_id, name in (id2label or {}).items():
        is_id = isinstance(class_id, (str, int)) and str(class_id).removeprefix("-").isdecimal()
        if not is_id or not isinstance(name, str):
            raise ValueError(
                f"`id2label` has {shown(class_id)}: {shown(name)}; it must be a dict of class ids to names."
            )
    return {str(class_id): name for class_id, name in (id2label or {}).items()} or None


def synonyms(id2label: dict[str, str]) -> dict[str, list[int]]:
    """Class ids by name; a label is known by its whole text and by each part between commas."""
    labels: dict[str, list[int]] = {}
    for class_id, name in id2label.items():
        for synonym in dict.fromkeys([name.strip(), *(part.strip() for part in name.split(","))]):
            labels.setdefault(synonym, []).append(int(class_id))
    return labels


class ClassLabelsMixin:
    """What a pipeline of class-conditional models makes of `class_labels`."""

    labels: dict[str, list[int]]
    transformer: Any

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of label names.

        Args:
            label (`str` or `list` of `str`): one name or several; a name of `id2label` or one of its synonyms.

        Raises:
            ValueError: for an unknown name, with the nearest ones, and for a name that several classes share.
        """
        ids = []
        for name in [label] if isinstance(label, str) else label:
            matches = self.labels.get(name.strip(), [])
            if not self.labels:
                raise ValueError(
                    f"This pipeline has no label names, so {shown(name)} is unknown: pass class ids instead."
                )
            if not matches:
                near = difflib.get_close_matches(name, self.labels, n=3, cutoff=0.0)
                raise ValueError(f"{shown(name)} is not a label. The nearest are {', '.join(map(shown, near))}.")
            if len(matches) > 1:
                raise ValueError(f"{name!r} names the classes {matches}: pass one of these ids instead.")
            if self.transformer is not None and not 0 <= matches[0] < self.transformer.config.num_classes:
                num_classes = self.transformer.config.num_classes
                raise ValueError(f"{name!r} names class {matches[0]}, but the model has {num_classes} classes.")
            ids.append(matches[0])
        return ids

    def prepare_class_labels(self, class_labels: int | str | None | list | torch.Tensor) -> list[int]:
        """Class ids of whatever names the classes; `None` becomes the null class.

        Args:
            class_labels: an id, a name, `None` (unconditional) or a list or tensor of them.

        Raises:
            ValueError: if the list is empty, an id is out of range or a name is unknown.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            is_plain = isinstance(class_labels, np.ndarray) or not (class_labels.is_sparse or class_labels.is_meta)
            if class_labels.ndim > 1 or not is_plain:
                raise ValueError(f"`class_labels` is {shown(class_labels)}; pass a tensor of class ids, `(images,)`.")
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("`class_labels` is empty: pass at least one class id or name.")

        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            if label is None:
                ids.append(num_classes)
            elif isinstance(label, str):
                ids += self.get_label_ids(label)
            elif is_count(label, least=0) and label < num_classes:
                ids.append(int(label))
            else:
                raise ValueError(
                    f"Class {shown(label)} is out of range: this model has {num_classes} classes, so pass an integer from 0 "
                    f"to {num_classes - 1}, or None for an unconditional sample."
                )
        return ids
"""What a call may put in the place of stage 1: a picture of the user's own, or codes."""

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor

"""What a picture must be for a model to see it: upright, 8 bits per channel, opaque, gray or RGB, and not too large."""

import PIL.Image
import PIL.ImageOps


ORIENTATION = 0x0112
MAX_MEGAPIXELS = 50
MAX_SIDE_RATIO = 50
GRAY_MODES = ("1", "L", "LA", "La")
COLOR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")


def check_picture(picture: PIL.Image.Image) -> None:
    """Refuses a picture by its size and mode, before its pixels are decoded.

    Args:
        picture (`PIL.Image.Image`): opened, loaded or not.

    Raises:
        ValueError: for no pixels, more than 50 megapixels, sides of more than 50 to 1, and for 16 bits per channel, floats
            and other modes whose range nobody knows. The message says what "it" is, so that a caller can name the file.
    """
    width, height = picture.size
    if min(width, height) < 1:
        raise ValueError(f"it is {width} x {height} and has no pixels")
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise ValueError(f"it is too large, {width} x {height}: make it smaller than {MAX_MEGAPIXELS} megapixels")
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise ValueError(f"it is too narrow, {width} x {height}: crop it to sides of at most {MAX_SIDE_RATIO} to 1")
    if picture.mode not in GRAY_MODES + COLOR_MODES:
        raise ValueError(f"its mode is {picture.mode}: convert it to 8 bits per channel, in colour or gray")


def prepare_picture(picture: PIL.Image.Image, background: str | tuple[int, ...] = "white") -> PIL.Image.Image:
    """A picture as every part of this package sees it.

    It is turned as its EXIF orientation says. What is transparent lies on the background. Palettes, CMYK and other colours
    become RGB; gray stays gray, on a coloured background too.

    Args:
        picture (`PIL.Image.Image`): a picture, left as it is.
        background (`str` or `tuple` of `int`, defaults to `"white"`): colour that Pillow knows, of 8 bits per channel.

    Returns:
        `PIL.Image.Image`: of mode `"L"` or `"RGB"`.

    Raises:
        ValueError: as [`check_picture`]. A damaged file, not decoded yet, raises its decoder's own error.
    """
    check_picture(picture)
    mode = "L" if picture.mode in GRAY_MODES else "RGB"
    if picture.getexif().get(ORIENTATION, 1) != 1:  # else Pillow would copy what it need not turn
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.has_transparency_data or picture.mode in ("La", "RGBa"):
        # Pillow converts premultiplied gray to nothing but gray with alpha.
        layer = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        behind = PIL.Image.new("RGBA", layer.size, background)
        picture = PIL.Image.alpha_composite(behind, layer)
    return picture.convert(mode)


# Noise on the codes where the embedder reads its level, measured in docs/evidence.md
DEFAULT_CODE_NOISE_LEVEL = 0.3

PriorImage = PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray]


def prepare_pictures(image: Any) -> list[PIL.Image.Image]:
    """A user's PIL picture, or a list of them, upright, opaque and of 8 bits per channel.

    Raises:
        ValueError: for a picture that is too large, too narrow, damaged or of another mode.
    """
    try:
        return [prepare_picture(picture) for picture in (image if isinstance(image, list) else [image])]
    except (ValueError, OSError, SyntaxError) as error:  # the last two from a file that is decoded only now
        raise ValueError(f"`image` cannot be used: {error}.") from error


def check_image(image: Any, is_gray: bool) -> None:
    """Refuses what is neither pictures nor floating-point arrays or tensors, one or a list of one kind and shape.

    Args:
        image: what a user passed.
        is_gray (`bool`): whether the model's pictures are, so that an array needs no channels.
    """
    items = image if isinstance(image, list) else [image]
    if not items:
        raise ValueError("`image` is an empty list: pass at least one picture.")
    kind = next((kind for kind in (PIL.Image.Image, np.ndarray, torch.Tensor) if isinstance(items[0], kind)), None)
    if kind is None or not all(isinstance(item, kind) for item in items):
        raise ValueError(
            "`image` is in incorrect format: pass a PIL picture, an array or a tensor, or a list of one kind."
        )
    for item in [] if kind is PIL.Image.Image else items:
        dims = (2, 3, 4) if is_gray else (3, 4)
        if item.ndim not in dims or 0 in item.shape or item.shape != items[0].shape:
            raise ValueError(
                f"`image` holds a shape of {tuple(item.shape)}: pass pictures, or arrays of pictures, of one size."
            )
        if kind is np.ndarray:
            is_real = item.dtype.kind == "f"
        else:
            is_real = item.is_floating_point() and item.layout == torch.strided and not item.is_meta
        if not is_real:
            raise ValueError(f"`image` holds {item.dtype}: pass real numbers in [0, 1], divide an 8-bit image by 255.")


class PriorInputsMixin:
    """Pictures and codes of the user's own, in the form that the first stage with a prior needs."""

    vae: Any
    transformer: Any
    latent_embedder: Any
    code_transformer: Any
    code_scheduler: Any
    image_processor: Any
    spatial_factor: int

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        channels = self.transformer.config.in_channels
        return channels, height // self.spatial_factor, width // self.spatial_factor

    def choose_prior_source(self, prior_source: str | None, codes: Any, image: Any) -> str:
        """Where the first prior comes from: `"codes"` or `"stage"`, which stands for a user's picture as well.

        Raises:
            ValueError: if the arguments contradict each other, or codes need a code model that is not there.
        """
        check_choice("prior_source", prior_source, ("codes", "stage", None))
        if image is not None and (codes is not None or prior_source == "codes"):
            raise ValueError("`image` and codes are both in the place of stage 1: pass one of them.")
        if codes is not None and prior_source == "stage":
            raise ValueError("`codes` are given but `prior_source` is 'stage': leave one of them out.")
        if image is not None:
            return "stage"
        if prior_source == "codes" and codes is None and self.code_transformer is None:
            raise ValueError(
                "`prior_source` is 'codes' but this pipeline has no code model: train one with `diffusers-dod "
                "train-codes`, pass `codes`, or use 'stage'."
            )
        has_codes = codes is not None or self.code_transformer is not None
        return prior_source or ("codes" if has_codes else "stage")

    def prepare_image_latents(
        self,
        image: PriorImage,
        batch_size: int,
        num_images_per_prompt: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Latents of a user's own picture, which stand for the sample of stage 1.

        Args:
            image: one picture for all samples, one for each label or one for each sample: PIL, array or tensor in
                [0, 1], or latents. A tensor of exactly the latents' shape is taken as latents; without a VAE, where
                pictures have that shape too, one with negative values is.
            batch_size (`int`): samples.
            num_images_per_prompt (`int`): samples per label.
            height (`int`):
                of the samples; PIL pictures are cropped to their size, turned as their EXIF orientation says and laid on
                white where they are transparent.
            width (`int`): of the samples.

        Raises:
            ValueError: for a picture that is not in [0, 1], not finite, or does not fit the model or the batch; for a PIL
                picture of more than 8 bits per channel, 50 megapixels, or sides of 50 to 1.
        """
        latent_shape = self._latent_shape(height, width)
        check_image(image, is_gray=self.image_processor.config.do_convert_grayscale)
        if torch.is_tensor(image) and (
            tuple(image.shape[-3:]) == latent_shape if self.vae is not None else bool((image < 0).any())
        ):
            image_latents = (image if image.ndim == 4 else image[None]).to(device=device, dtype=dtype)
        else:
            is_pil = isinstance(image[0] if isinstance(image, list) else image, PIL.Image.Image)
            if is_pil:
                image = prepare_pictures(image)
            pixels = self.image_processor.preprocess(image, height, width, resize_mode="crop" if is_pil else "default")
            channels = latent_shape[0] if self.vae is None else 3
            if pixels.shape[1] != channels:
                raise ValueError(
                    f"`image` has {pixels.shape[1]} channels: pass a picture of {channels}, or latents of {latent_shape}."
                )
            if pixels.abs().max() > 1.01:  # 1 and some rounding
                raise ValueError("`image` holds values outside of [0, 1]: divide an 8-bit image by 255.")
            image_latents = encode_images(self.vae, pixels.to(device=device, dtype=dtype)).to(dtype)
        if not torch.isfinite(image_latents).all():
            raise ValueError("`image` holds NaN or infinite values, or the VAE made them of it.")

        num_labels = batch_size // num_images_per_prompt
        if image_latents.shape[0] == 1:
            image_latents = image_latents.expand(batch_size, -1, -1, -1)
        elif image_latents.shape[0] == num_labels:
            image_latents = image_latents.repeat_interleave(num_images_per_prompt, dim=0)
        if tuple(image_latents.shape) != (batch_size, *latent_shape):
            raise ValueError(
                f"`image` gives latents of {tuple(image_latents.shape)}; for these arguments they must be "
                f"{(batch_size, *latent_shape)}, with one picture or one for each label."
            )
        return image_latents

    def check_output_type(self, output_type: str) -> None:
        """Refuses what is no form of output, and pictures where the samples are latents."""
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        channels = self.transformer.config.in_channels
        if output_type == "pil" and self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"This pipeline has no autoencoder and its samples have {channels} channels: they are latents, not pictures. "
                "Pass `output_type='latent'`, or load the pipeline with the `vae=` that the transformer was trained on."
            )

    def check_code_generation(self, height: int, width: int, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuses what the code model cannot generate codes with: its scheduler, sizes and numbers."""
        check_count("code_num_inference_steps", num_inference_steps)
        check_numbers(code_guidance_scale=guidance_scale)
        scheduler, transformer = self.code_scheduler, self.code_transformer
        check_scheduler(type(scheduler), scheduler.config, transformer.config, "code_scheduler")
        grid = self.latent_embedder.code_grid(*self._latent_shape(height, width)[1:])
        check_code_grid(grid, transformer.config.patch_size, height, width)

    def check_code_noise_level(self, code_noise_level: float | None) -> None:
        """Refuses what is no level, or any level where the embedder reads none."""
        if code_noise_level is None:
            return
        check_shares(code_noise_level=code_noise_level)
        if not self.latent_embedder.config.noise_level_input:
            raise ValueError(
                "`code_noise_level` is given but this pipeline's latent embedder has no `noise_level_input`: leave it out."
            )

    def prepare_code_noise(
        self,
        code_noise_level: float | None,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> dict[str, Any]:
        """Arguments of the embedder: fresh noise on the codes and its level, where it reads one."""
        config = self.latent_embedder.config
        if not config.noise_level_input:
            return {}
        rows, columns = self.latent_embedder.code_grid(*self._latent_shape(height, width)[1:])
        shape = (batch_size, rows * columns, config.bottleneck_dim)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return {
            "code_noise": noise,
            "noise_level": DEFAULT_CODE_NOISE_LEVEL if code_noise_level is None else code_noise_level,
        }

    def prepare_codes(
        self, codes: torch.Tensor, batch_size: int, height: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A user's own codes: one set for all images, one per label or one per image."""
        grid = self.latent_embedder.code_grid(*self._latent_shape(height, width)[1:])
        shape = (batch_size, grid[0] * grid[1], self.latent_embedder.config.bottleneck_dim)
        if torch.is_tensor(codes) and codes.ndim == 3 and codes.shape[0] and batch_size % codes.shape[0] == 0:
            codes = codes.repeat_interleave(batch_size // codes.shape[0], dim=0)
        check_tensor("codes", codes, shape)
        return codes.to(device=device, dtype=dtype)
"""What a saved DoD pipeline holds, in a folder or in a repository of the Hub, and how it is read back.

    model_index.json                        the components' classes
    pipeline.py                             the pipeline's own code, for those who have diffusers only
    transformer/, latent_embedder/          config.json, safetensors, diffusers_dod.py
    code_transformer/, weak_transformer/    the same, where there are such models
    scheduler/, code_scheduler/, vae/,      classes of diffusers, as in its other pipelines
    guider/
    block.py, modular_config.json           blocks of Modular Diffusers, with all code that they need
    modular_model_index.json                their components

`DiffusionPipeline` and `ModularPipeline` run the code that is carried, with `trust_remote_code=True` only. `DoDPipeline`
never does: it takes the models' classes from beside itself, whatever module the index names. The models' code is named as the
package because `AutoModel` looks for the module of that name: the package, where it is imported, or the file.
"""

import ast
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import safe_open



INDEX_NAME = "model_index.json"
MODEL_CLASSES = ("DoDTransformer2DModel", "DoDLatentEmbedder")
# Where both are in the package, and beside a repository's own `pipeline.py`
MODELS_NAME, CARRIED_NAME = "models_dod", "diffusers_dod"
# Of the blocks: their file in this package and in a repository, their module's name wherever it was loaded from, and
# diffusers' names of what describes them.
BLOCKS_SOURCE, BLOCK_NAME, BLOCK_MODULE = "modular_dod.py", "block.py", "diffusers_dod_block"
BLOCK_CONFIG_NAME, MODULAR_INDEX_NAME = "modular_config.json", "modular_model_index.json"


def standalone_source(file: Path, inlined: set[str] | None = None) -> str:
    """The text of a module with the modules that it imports from its own package in the place of the imports.

    diffusers downloads one file of code for each component, so a carried file cannot import its neighbours.
    """
    inlined = set() if inlined is None else inlined
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    texts = []
    # In their order: a module stands where it is first needed.
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None:
            is_new = node.module not in inlined
            inlined.add(node.module)
            texts.append((node, standalone_source(file.with_name(f"{node.module}.py"), inlined) if is_new else ""))
    for node, text in reversed(texts):
        lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


def carried_code(index: dict[str, Any], pipeline_file: str | None = None) -> dict[str, str]:
    """The code that a repository carries, by its path there.

    Args:
        index (`dict`): what its `model_index.json` holds.
        pipeline_file (`str`, *optional*): the pipeline's module, this package's by default; the models' is its neighbour.
    """
    file = Path(pipeline_file or Path(__file__).with_name("pipeline_dod.py"))
    carried = file.with_name(f"{CARRIED_NAME}.py")
    models = standalone_source(carried if carried.exists() else file.with_name(f"{MODELS_NAME}.py"))
    folders = [name for name, entry in index.items() if isinstance(entry, list) and entry[1] in MODEL_CLASSES]
    return {"pipeline.py": standalone_source(file), **{f"{name}/{CARRIED_NAME}.py": models for name in folders}}


def carried_blocks(
    index: dict[str, Any], source: str | None, revision: str | None = None, pipeline_file: str | None = None
) -> dict[str, str]:
    """The blocks that a repository carries and what describes them, by its path there.

    Args:
        index, source, revision: as for [`modular_files`].
        pipeline_file (`str`, *optional*): as for [`carried_code`]; a repository's own pipeline has no blocks beside it.
    """
    blocks = Path(pipeline_file or __file__).with_name(BLOCKS_SOURCE)
    if not blocks.is_file():
        return {}
    files = {name: json_text(value) for name, value in modular_files(index, source, revision).items()}
    return {BLOCK_NAME: standalone_source(blocks), **files}


def modular_files(index: dict[str, Any], source: str | None, revision: str | None = None) -> dict[str, dict[str, Any]]:
    """What diffusers must know of the blocks, by the name of its file.

    Args:
        index (`dict`): what `model_index.json` holds.
        source (`str`, *optional*): folder or repository from which the components are loaded.
        revision (`str`, *optional*): its branch.
    """
    modular_index = {
        "_class_name": "ModularPipeline",
        "_blocks_class_name": "DoDStages",
        "_diffusers_version": diffusers.__version__,
        "id2label": index.get("id2label"),
        "code_guidance_scale": index.get("code_guidance_scale", 1.0),
    }
    for component, entry in index.items():
        if isinstance(entry, list) and not component.startswith("_") and entry[0] is not None:
            where = {"pretrained_model_name_or_path": source, "subfolder": component, "revision": revision}
            hint = modular_class(*entry)
            modular_index[component] = [*hint, {**where, "variant": None, "type_hint": hint}]
    config = {
        "_class_name": "DoDStages",
        "_diffusers_version": diffusers.__version__,
        "auto_map": {"ModularPipelineBlocks": "block.DoDStages"},
    }
    return {BLOCK_CONFIG_NAME: config, MODULAR_INDEX_NAME: modular_index}


def modular_class(library: str, name: str) -> list[str]:
    """How `modular_model_index.json` names a class: ours by the blocks' module, which is loaded by then."""
    return [BLOCK_MODULE if name in MODEL_CLASSES else library, name]


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_code(folder: str | os.PathLike, pipeline_file: str | None = None) -> None:
    """Writes the code of a saved pipeline into its folder, and its name into the index.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained` wrote.
        pipeline_file (`str`, *optional*): as for [`carried_code`].
    """
    index_file = Path(folder, INDEX_NAME)
    index = index_with_code(json.loads(index_file.read_text(encoding="utf-8")))
    for path, text in carried_code(index, pipeline_file).items():
        Path(folder, path).write_text(text, encoding="utf-8")
    index_file.write_text(json_text(index), encoding="utf-8")


def write_blocks(
    folder: str | os.PathLike, place: str | os.PathLike | None = None, pipeline_file: str | None = None
) -> None:
    """Writes the blocks of a saved pipeline, which name the folder that they lie in, into it.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained` wrote.
        place (`str` or `os.PathLike`, *optional*): where the folder is moved to next.
        pipeline_file (`str`, *optional*): as for [`carried_code`].
    """
    index = json.loads(Path(folder, INDEX_NAME).read_text(encoding="utf-8"))
    for path, text in carried_blocks(index, str(place or folder), pipeline_file=pipeline_file).items():
        Path(folder, path).write_text(text, encoding="utf-8")


def index_with_code(index: dict[str, Any]) -> dict[str, Any]:
    """The index of a folder that carries its code, in the form that diffusers' `trust_remote_code` reads."""
    names = {
        component: [CARRIED_NAME, entry[1]]
        for component, entry in index.items()
        if isinstance(entry, list) and entry[1] in MODEL_CLASSES
    }
    return {**index, **names, "_class_name": ["pipeline", "DoDPipeline"]}


def models_module(package: str) -> ModuleType:
    """The module with both models beside the pipeline's, in this package or in the copy of a repository's code."""
    carried = f"{package}.{CARRIED_NAME}"
    return importlib.import_module(carried if importlib.util.find_spec(carried) else f"{package}.{MODELS_NAME}")


def resolve_index(index: dict[str, Any], pipeline_classes: list[str], package: str, source: str) -> dict[str, Any]:
    """The index with our classes taken from `package`, whatever code the repository carries.

    Args:
        index (`dict`): what `model_index.json` holds.
        pipeline_classes (`list` of `str`): names of the pipeline's class and its bases.
        package (`str`): package of the pipeline's module.
        source (`str`): folder or repository, for messages.

    Raises:
        ValueError: if it is another pipeline's, or a component's class comes from a module that is not loaded yet.
    """
    class_name = index.get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name not in pipeline_classes:
        raise ValueError(
            f"{source} holds a {class_name}, not a DoDPipeline. If you trust the code in it, load it with "
            "`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`."
        )
    resolved = {**index, "_class_name": class_name}
    resolved.pop("auto_map", None)
    for component, entry in index.items():
        if not isinstance(entry, list) or component.startswith("_") or entry[0] is None:
            continue
        library, component_class = entry
        if component_class in MODEL_CLASSES:
            # diffusers wants it imported
            resolved[component] = [models_module(package).__name__, component_class]
        elif library not in ("diffusers", "transformers") and library not in sys.modules:
            # Importing a module because a repository names it would run it.
            raise ValueError(
                f"{source} takes its `{component}` from the module {library!r}, which is not diffusers'. None of its code "
                f"was run. If it is yours, import {library} first; if it is code in the repository and you trust it, "
                "load with `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`."
            )
    return resolved


def download_snapshot(
    repo_id: str, passed_components: set[str], variant: str | None = None, revision: str | None = None, **options: Any
) -> str:
    """Downloads the configs and the safetensors that a pipeline needs, and no code.

    Args:
        repo_id (`str`): repository of the Hub.
        passed_components (`set` of `str`): components that are at hand and need no download.
        variant (`str`, *optional*): variant of the weights; a component without it comes in its default one.
        revision (`str`, *optional*): branch, tag or commit.
        options: `cache_dir`, `token`, `force_download` and `local_files_only` of `huggingface_hub`.

    Returns:
        `str`: the snapshot's folder.
    """
    index_file = hf_hub_download(repo_id, INDEX_NAME, revision=revision, **options)
    # All that follows is of the same commit, also if somebody pushes in between.
    commit = Path(index_file).parent.name
    components = [
        component
        for component, entry in json.loads(Path(index_file).read_text(encoding="utf-8")).items()
        if isinstance(entry, list)
        and not component.startswith("_")
        and entry[0]
        and component not in passed_components
    ]

    def fetch(names: list[str], weights: list[str], ignored: list[str]) -> Path:
        allowed = [f"{name}/{pattern}" for name in names for pattern in ("*.json", *weights)]
        return Path(
            snapshot_download(repo_id, revision=commit, allow_patterns=allowed, ignore_patterns=ignored, **options)
        )

    folder, remaining = Path(index_file).parent, components
    if variant is not None:
        folder = fetch(components, [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"], [])
        remaining = [name for name in components if not any((folder / name).glob(f"*.{variant}[.-]*"))]
    if remaining:
        folder = fetch(remaining, ["*.safetensors"], ["*.*.safetensors"])
    return str(folder)


def check_weights(folder: str, passed_components: set[str], source: str, variant: str | None = None) -> None:
    """Refuses models whose weights are not safetensors, and our own models whose weights lack a tensor.

    diffusers would fill a missing tensor at random, with a line in the log.

    Raises:
        ValueError: naming the component.
    """
    for config in sorted(Path(folder).glob("*/config.json")):
        component = config.parent
        if component.name in passed_components:
            continue
        if not any(component.glob("*.safetensors")):
            raise ValueError(
                f"{source} has no safetensors weights for `{component.name}`. Pickled ones (.bin, .pt, .ckpt) can run "
                "code when they are read, so they are not loaded: ask the author for safetensors, or, if you trust the "
                "files, download them, load the folder with `use_safetensors=False` and save it again."
            )
        values = json.loads(config.read_text(encoding="utf-8"))
        name = values.get("_class_name")
        if name not in MODEL_CLASSES or "quantization_config" in values:
            continue
        model_class = getattr(models_module(__name__.rpartition(".")[0]), name)
        with torch.device("meta"):
            expected = set(model_class.from_config(values).state_dict())
        missing = sorted(expected - _tensor_names(component, variant))
        if missing:
            raise ValueError(
                f"{source}: the weights of `{component.name}` lack {missing[0]} ({len(missing)} of {len(expected)} tensors "
                "are missing): the folder is incomplete or not of this model."
            )


def check_not_a_checkpoint(folder: str) -> None:
    """Refuses a trainer's `checkpoint-N`, which has the models that are trained and their state.

    Raises:
        ValueError: with where the run's pipeline is.
    """
    has_index = Path(folder, INDEX_NAME).exists()
    if not has_index and Path(folder, "training_config.json").exists() and Path(folder, "checksums.json").exists():
        run = Path(folder).resolve().parent
        config = json.loads(Path(folder, "training_config.json").read_text(encoding="utf-8"))
        cure = "load that. The checkpoint has only the weights that are trained, to resume from."
        if config.get("train") == ["all"] and config.get("transformer_config"):
            cure = (
                f"load that, with this step's models: `DoDPipeline.from_pretrained({str(run)!r}, transformer="
                f"DoDTransformer2DModel.from_pretrained({folder!r}, subfolder='transformer'))`, and the `latent_embedder` "
                "likewise. Averaged weights are in subfolders such as 'transformer_ema_0.9999'."
            )
        raise ValueError(
            f"{folder} is a checkpoint of a training run. When the run has ended, its pipeline is in {run}: {cure}"
        )


def _tensor_names(component: Path, variant: str | None) -> set[str]:
    """Names of the tensors in the files of a variant, or of the default one where it is not there."""
    of_variant = list(component.glob(f"*.{variant}[.-]*")) if variant is not None else []
    names: set[str] = set()
    for file in of_variant or [file for file in component.glob("*.safetensors") if file.name.count(".") == 1]:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                names |= set(weights.keys())
    return names


class DoDRepositoryMixin:
    """How [`DoDPipeline`] is loaded and saved: from a folder or the Hub without running code, to a folder with its code."""

    @classmethod
    def _pipeline_class(cls) -> type:
        """The class that this mixin was made for, of which `cls` may be a subclass."""
        return next(base for base in cls.__mro__ if DoDRepositoryMixin in base.__bases__)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a pipeline from a folder or from the Hub; code that it carries is neither needed nor run.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or a repository of the Hub.
            kwargs:
                as in [`DiffusionPipeline.from_pretrained`]: `dtype`, `variant`, `revision`, `token`, ...
                `trust_remote_code` is ignored.

        Raises:
            ValueError: if the folder holds another pipeline or a training checkpoint, if a component's class is of a
                module that is neither diffusers, transformers, this package nor imported before, or if weights are
                pickled or lack tensors.
        """
        source = str(pretrained_model_name_or_path)
        kwargs.pop("trust_remote_code", None)
        if "dtype" in kwargs:
            kwargs[DTYPE_ARGUMENT] = kwargs.pop("dtype")
        folder = source if os.path.isdir(source) else cls.download(source, **kwargs)
        check_not_a_checkpoint(folder)
        if kwargs.setdefault("use_safetensors", True):
            check_weights(folder, set(kwargs), source, kwargs.get("variant"))
        pipeline = super().from_pretrained(folder, **kwargs)  # type: ignore[misc]
        pipeline.register_to_config(_name_or_path=source)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, dtype: Any = None, torch_dtype: Any = None, **components: Any) -> Any:
        """A pipeline with the components, labels and code guidance of another, as diffusers' own pipelines have it.

        Args:
            pipeline: any pipeline with a DoD pipeline's components.
            dtype (`torch.dtype`, *optional*): to which the shared models are brought.
            torch_dtype (`torch.dtype`, *optional*): its older name.
            components: those that take the place of the other pipeline's.

        Raises:
            ValueError: for a component that a DoD pipeline does not have.
        """
        expected = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
        if unknown := sorted(set(components) - expected):
            raise ValueError(f"{cls.__name__} has no component {unknown[0]!r}; it has {', '.join(sorted(expected))}.")
        shared = {name: part for name, part in pipeline.components.items() if name in expected}
        own = {name: pipeline.config[name] for name in ("id2label", "code_guidance_scale") if name in pipeline.config}
        new = cls(**{**own, **shared, **components})
        dtype = torch_dtype if dtype is None else dtype
        return new if dtype is None else new.to(dtype=dtype)  # type: ignore[attr-defined]

    # diffusers' own `download` refuses a repository that carries code, and fails on a component of a third-party
    # package that does not; overriding it and `load_config` changes nothing outside this class.
    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Downloads what `from_pretrained` reads of a repository, without its code; returns the folder."""
        options = {
            name: kwargs[name]
            for name in ("variant", "revision", "cache_dir", "token", "force_download", "local_files_only")
            if kwargs.get(name) is not None
        }
        return download_snapshot(pretrained_model_name, passed_components=set(kwargs), **options)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> dict[str, Any] | tuple:
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        config, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
        classes = [base.__name__ for base in cls.__mro__]
        package = cls._pipeline_class().__module__.rpartition(".")[0]
        config = resolve_index(config, classes, package, str(pretrained_model_name_or_path))
        return (config, *rest) if rest else config

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the pipeline and its code, so that it also loads with diffusers alone and `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): a folder, made if need be.
            push_to_hub (`bool`, defaults to `False`): whether to also push with [`~DoDPipeline.push_to_hub`].
            kwargs:
                of [`DiffusionPipeline.save_pretrained`], such as `variant` and `max_shard_size`. With
                `push_to_hub=True`, all but `safe_serialization` and `max_shard_size` go to the push, which needs
                `license`; `repo_id` is by default the folder's name.

        Raises:
            ValueError: if a LoRA is loaded, which the saved weights would hold in peft's layout.
        """
        if getattr(self.transformer, "peft_config", None):  # type: ignore[attr-defined]
            raise ValueError(
                "The transformer has a LoRA beside its weights: save it with `save_lora_weights`, and call "
                "`unload_lora_weights()`, after `fuse_lora()` to keep what it does, before the pipeline is saved."
            )
        weights = kwargs
        if push_to_hub:
            weights = {name: kwargs.pop(name) for name in ("safe_serialization", "max_shard_size") if name in kwargs}
        # diffusers leaves out what was None at first and was set later, such as a guider.
        self.register_modules(**{name: getattr(self, name) for name in self._optional_components})  # type: ignore[attr-defined]
        super().save_pretrained(save_directory, **weights)  # type: ignore[misc]
        if type(self) is self._pipeline_class():  # the code of a subclass may be anything, such as a user's script
            pipeline_file = str(sys.modules[type(self).__module__].__file__)
            write_code(save_directory, pipeline_file)
            write_blocks(save_directory, pipeline_file=pipeline_file)
        if push_to_hub:
            self.push_to_hub(  # type: ignore[attr-defined]
                kwargs.pop("repo_id", Path(save_directory).name), **kwargs
            )


# Class guidance where a call gives none: of stage 1, of a stage after another, and of one that starts from codes.
FIRST_GUIDANCE, LATER_GUIDANCE, CODES_GUIDANCE = 1.5, 1.25, 2.0


@dataclass
class DoDPipelineOutput(BaseOutput):
    """
    Args:
        images (list of `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            The last stage's samples: PIL images, an array `(images, height, width, channels)` or a tensor `(images,
            channels, height, width)` in [0, 1], or latents.
        stages (`list`, *optional*): the same of every stage that ran, in order; `None` unless `return_stages=True`.
        codes (`torch.Tensor`, *optional*):
            Codes behind the first prior, without added noise, `(images, rows * columns, bottleneck_dim)`: generated,
            passed in, or encoded from `image` or the stage before. `None` if no stage had a prior.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    stages: list[list[PIL.Image.Image] | np.ndarray | torch.Tensor] | None = None
    codes: torch.Tensor | None = None


class DoDPipeline(DoDRepositoryMixin, ClassLabelsMixin, PriorInputsMixin, DiffusionPipeline, DoDLoraLoaderMixin):
    r"""Class-conditional image generation by Diffusion on Diffusion (Yue et al. 2024, arXiv 2410.08531).

    Stage 1 sees the class only. Every later stage restarts from noise and also sees prior tokens: once per stage, the
    latent embedder compresses the previous stage's sample to codes, a few numbers per patch, and decodes these to tokens.
    With a code model, the codes of the first stage are generated instead, so every stage sees a prior.

    Parameters:
        transformer ([`DoDTransformer2DModel`]): denoiser of all stages.
        latent_embedder ([`DoDLatentEmbedder`]): turns latents into prior tokens.
        scheduler ([`SchedulerMixin`]):
            A diffusers scheduler for the transformer's prediction type; an unsupported one is refused in the call.
        vae ([`ModelMixin`], *optional*): image autoencoder; `None` for a model of pixels.
        id2label (`dict` of `str` or `int` to `str`, *optional*):
            Class id to name, saved in the pipeline's config. A name may hold synonyms separated by commas.
        code_transformer ([`DoDTransformer2DModel`], *optional*):
            Model of the codes: denoises the embedder's normalised codes, `(batch, bottleneck_dim, rows, columns)`.
        code_scheduler ([`SchedulerMixin`], *optional*): its scheduler.
        guider ([`BaseGuidance`], *optional*):
            One of diffusers' guiders, instead of `guidance_scale`; it guides the stages, not the code model.
        weak_transformer ([`DoDTransformer2DModel`], *optional*):
            A weaker model for autoguidance (Karras et al. 2024, arXiv 2406.02507), such as an early checkpoint of
            `transformer` or one with fewer layers; of the same classes, latents, patch size and width.
        code_guidance_scale (`float`, defaults to 1.0):
            Class guidance of the code model in calls that do not name any, saved in the pipeline's config.
    """

    model_cpu_offload_seq = "code_transformer->latent_embedder->transformer->vae"
    _optional_components = ["vae", "code_transformer", "code_scheduler", "guider", "weak_transformer"]
    _callback_tensor_inputs = ["latents", "prior_tokens"]

    # Of the call that runs
    _num_stages = _current_stage = _num_timesteps = 0
    _interrupt = False
    _guidance_scale: Any = 1.0
    _prior_guidance_scale: Any = None
    _current_timestep: torch.Tensor | None = None

    def __init__(
        self,
        # Not the models' own classes: a repository's code for the pipeline is one file, and theirs are others.
        transformer: ModelMixin,
        latent_embedder: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict[Any, str] | None = None,
        code_transformer: ModelMixin | None = None,
        code_scheduler: SchedulerMixin | None = None,
        guider: BaseGuidance | None = None,
        weak_transformer: ModelMixin | None = None,
        code_guidance_scale: float = 1.0,
    ):
        super().__init__()
        components = {
            "transformer": transformer,
            "latent_embedder": latent_embedder,
            "scheduler": scheduler,
            "vae": vae,
            "code_transformer": code_transformer,
            "code_scheduler": code_scheduler,
            "guider": guider,
            "weak_transformer": weak_transformer,
        }
        check_kinds(components)
        self.register_modules(**components)
        id2label = text_labels(id2label)
        check_numbers(code_guidance_scale=code_guidance_scale)
        self.register_to_config(id2label=id2label, code_guidance_scale=code_guidance_scale)

        self.labels = synonyms(id2label or {})
        if transformer is None or latent_embedder is None:
            return
        check_components(transformer.config, latent_embedder.config, vae)
        if code_transformer is not None:
            check_code_model(code_transformer.config, transformer.config, latent_embedder.config)
        if weak_transformer is not None:
            check_weak_model(weak_transformer.config, transformer.config)
        self.spatial_factor = vae_spatial_factor(vae)
        self.image_processor = make_image_processor(vae, transformer.config)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str | None:
        """Pushes the pipeline with its code and a model card in one commit; returns its URL, `None` for a dry run.

        Args:
            repo_id (`str`): repository, created if missing.
            kwargs: arguments of [`diffusers_dod.hub.push_folder`]: `private`, `token`, ...; `license` is required.
        """
        try:
            from diffusers_dod.hub.push import push_pipeline
        except ImportError:  # this is a repository's own code, and the package is not installed: no card then
            return super().push_to_hub(repo_id, **kwargs)
        return push_pipeline(self, repo_id, **kwargs)

    # Properties that a callback may read; it changes guidance by setting `_guidance_scale` and
    # `_prior_guidance_scale`, and stops by setting `_interrupt`.
    @property
    def guidance_scale(self) -> float:
        """Class guidance of the stage that runs."""
        return self._guidance_scale

    @property
    def prior_guidance_scale(self) -> float | None:
        """Prior guidance of the stage that runs."""
        return self._prior_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        has_scale = self._guidance_scale != 1.0 or self._prior_guidance_scale not in (None, 1.0)
        return has_scale or (self.guider is not None and self._current_stage > 0)

    @property
    def current_stage(self) -> int:
        """The stage that runs, from 1."""
        return self._current_stage

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of all stages started so far."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        batch_size,
        num_stages,
        num_inference_steps,
        guidance_scale,
        prior_guidance_scale,
        guidance_interval,
        generator,
        height,
        width,
        latents,
        image,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
        prior_source,
        codes,
        code_num_inference_steps,
        code_guidance_scale,
        code_noise_level,
    ):
        check_count("num_stages", num_stages)
        if image is not None and num_stages < 2:
            raise ValueError("`image` replaces stage 1, so `num_stages` must be at least 2.")
        check_per_stage(
            num_stages,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            prior_guidance_scale=prior_guidance_scale,
            guidance_interval=guidance_interval,
        )
        check_steps(num_inference_steps, num_stages)
        if guidance_scale is not None:
            check_scales("guidance_scale", guidance_scale, num_stages)
        check_scales("prior_guidance_scale", prior_guidance_scale, num_stages, or_none=True)
        check_intervals(guidance_interval, num_stages)
        check_generator(generator, batch_size)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

        patch_size = self.transformer.config.patch_size
        if num_stages > 1 or prior_source == "codes":  # or a size that only the embedder cannot cut would fail late
            patch_size = math.lcm(patch_size, self.latent_embedder.config.patch_size)
        check_size(height, width, self.spatial_factor * patch_size)
        if latents is not None:
            check_tensor("latents", latents, (batch_size, *self._latent_shape(height, width)))
        check_scheduler(type(self.scheduler), self.scheduler.config, self.transformer.config)
        self.check_code_noise_level(code_noise_level)
        if prior_source == "codes" and codes is None:
            self.check_code_generation(height, width, code_num_inference_steps, code_guidance_scale)
        self.check_output_type(output_type)

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A stage's initial noise, standard normal, `(batch, channels, height/factor, width/factor)`."""
        if latents is None:
            shape = (batch_size, *self._latent_shape(height, width))
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype)

    @torch.no_grad()
    def generate_codes(
        self,
        class_ids: torch.Tensor,
        height: int,
        width: int,
        num_inference_steps: int = 30,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> torch.Tensor:
        """Generates codes with the code model, guided by the class in every step.

        Args:
            class_ids (`torch.Tensor`): `(images,)` of integers, on the code model's device.
            height (`int`): Height in pixels of the images that the codes are for.
            width (`int`): Width in pixels.
            guidance_scale (`float`, defaults to 1.0): Class guidance; the config's `code_guidance_scale` is not used.

        Returns:
            `torch.Tensor`: `(images, rows * columns, bottleneck_dim)`, not normalised.
        """
        self._current_stage, self._num_timesteps, self._interrupt = 0, 0, False
        self._guidance_scale, self._prior_guidance_scale = guidance_scale, None
        grid = self.latent_embedder.code_grid(*self._latent_shape(height, width)[1:])
        shape = (len(class_ids), self.code_transformer.config.in_channels, *grid)
        noise = randn_tensor(shape, generator=generator, device=class_ids.device, dtype=self.code_transformer.dtype)
        codes = self.denoise(
            self.code_scheduler,
            noise,
            class_ids,
            None,
            num_inference_steps,
            ScaleGuidance(self.code_transformer, "class", self._guidance_scales, (0.0, 1.0)),
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return self.latent_embedder.denormalize_codes(codes)

    def _guidance_scales(self) -> tuple[float, float | None]:
        return self._guidance_scale, self._prior_guidance_scale

    def prepare_guidance(self, guidance_drop: str | None, guidance_interval: tuple[float, float]) -> StageGuidance:
        """A stage's guidance: the guider's if there is one, else by the scales of the moment."""
        drop = guidance_drop or ("class" if self.weak_transformer is None else "nothing")
        if self.guider is not None:
            return GuiderGuidance(self.transformer, drop, self.guider, self.weak_transformer)
        return ScaleGuidance(self.transformer, drop, self._guidance_scales, guidance_interval, self.weak_transformer)

    def denoise(
        self,
        scheduler: SchedulerMixin,
        latents: torch.Tensor,
        class_ids: torch.Tensor,
        prior_tokens: torch.Tensor | None,
        num_inference_steps: int,
        guidance: StageGuidance,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> torch.Tensor:
        """Runs one stage, or the code model, from standard normal noise to its sample, with the scales of the moment."""
        run = Denoising(scheduler, latents, num_inference_steps, generator)
        latents = run.latents
        first_step, self._num_timesteps = self._num_timesteps, self._num_timesteps + len(run.timesteps)

        with self.progress_bar(total=len(run.timesteps)) as progress_bar:
            stage = f"Stage {self._current_stage}/{self._num_stages}" if self._current_stage else "Codes"
            progress_bar.set_description(stage)
            for i, timestep in enumerate(run.timesteps):
                if self._interrupt:
                    break
                self._current_timestep = timestep
                latents = run.step(i, latents, guidance, class_ids, prior_tokens)
                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    changed = callback_on_step_end(self, first_step + i, timestep, callback_kwargs)
                    latents, prior_tokens = changed_tensors(changed, latents=latents, prior_tokens=prior_tokens)
                progress_bar.update()
        self._current_timestep = None
        return latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Samples of a stage in the form that `output_type` names."""
        self.check_output_type(output_type)
        check_sample(latents, self.scheduler)
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | None | list[int | str | None] | torch.Tensor,
        num_stages: int | None = None,
        num_inference_steps: int | list[int] = 30,
        guidance_scale: float | list[float] | None = None,
        prior_guidance_scale: float | list[float] | None = None,
        guidance_drop: str | None = None,
        guidance_interval: tuple[float, float] | list[tuple[float, float]] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image: PriorImage | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_stages: bool = False,
        callback_on_step_end: Callable[["DoDPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        prior_source: str | None = None,
        codes: torch.Tensor | None = None,
        code_num_inference_steps: int = 30,
        code_guidance_scale: float | None = None,
        code_noise_level: float | None = None,
    ) -> DoDPipelineOutput | tuple:
        r"""Generates images of the given classes.

        Args:
            class_labels (`int`, `str`, `None`, or a `list` or `torch.Tensor` of them):
                Class ids in `[0, num_classes)` or names of `id2label`; `None` is an unconditional sample.
            num_stages (`int`, *optional*):
                Number of stages. By default 2, or 1 from codes, whose generation is not counted. With `image`, the
                skipped stage 1 is counted, so at least 2 are needed; lists then also have an entry for it.
            num_inference_steps (`int` or `list` of `int`, defaults to 30): Denoising steps, one entry per stage or one for all.
            guidance_scale (`float` or `list` of `float`, *optional*):
                Strength of classifier-free guidance; 1 turns it off. One entry per stage or one for all. By default 1.5 in
                a stage without a prior, 2 straight from codes, 1.25 after a stage or `image`. Not with a `guider`.
            prior_guidance_scale (`float` or `list` of `float`, *optional*):
                Separate guidance scale for the prior; each guided step then makes a third prediction, and
                `guidance_scale` guides by the class only. In a stage without a prior, `guidance_drop` still applies. Not
                with a `guider` or a `weak_transformer`.
            guidance_drop (`str`, *optional*):
                The condition left out of guidance's second prediction: `"class"` (default), `"prior"`, `"both"`, or
                `"nothing"`, the default with a `weak_transformer`, which needs that model or a guider that changes layers.
            guidance_interval (`tuple` of two `float`, or a `list` of such tuples, *optional*):
                The steps that are guided, as fractions of the stage's steps from noise (0) to sample (1), by default
                `(0.25, 0.75)`; `(0, 1)` guides every step (Kynkäänniemi et al. 2024, arXiv 2404.07724). One tuple for all
                stages or a list with one per stage. Not with a `guider`.
            num_images_per_prompt (`int`, defaults to 1): Images per label.
            height (`int`, *optional*):
                Height in pixels; by default that of `latents`, or the transformer's `sample_size` times the VAE's factor.
            width (`int`, *optional*): Width in pixels, with the same default.
            generator (`torch.Generator` or a `list` of them, *optional*):
                Source of all noise. With a list, one for each image, an image does not depend on its batch.
            latents (`torch.Tensor`, *optional*):
                Standard normal noise for the first stage that runs, `(images, channels, height, width)`. Later stages
                draw from `generator`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list, *optional*):
                Your own picture in place of stage 1's sample; stage 1 is then skipped. One for all images, one per label
                or one per image. PIL images are resized and cropped; arrays `(..., height, width, channels)` and tensors
                `(..., channels, height, width)` hold values in [0, 1] and are resized. A tensor is taken as latents if it
                has their shape (with a VAE) or negative values (without one).
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`DoDPipelineOutput`] or a tuple.
            return_stages (`bool`, defaults to `False`): Whether to also return every stage's samples.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, timestep, kwargs)` after each step; `step` counts from 0 over the
                code model and all stages. Returns a dict of the tensors that it changed. It may set
                `pipeline._guidance_scale` and `pipeline._prior_guidance_scale`: for the rest of the call, or of the
                stage if that argument is a list, as the default `guidance_scale` is.
                `pipeline._interrupt = True` ends the call with the sample as it is. During code generation,
                `pipeline.current_stage` is 0, `latents` are the normalised codes, the scale is that of the codes, and an
                interrupt leaves the first stage's noise.
            callback_on_step_end_tensor_inputs (`list` of `str`, defaults to `["latents"]`):
                Tensors passed to the callback: `"latents"`, `"prior_tokens"`.
            prior_source (`str`, *optional*):
                `"codes"` starts from the given `codes` or the code model's, `"stage"` from stage 1 or `image`. By default
                `"stage"` with `image`, else `"codes"` if `codes` are given or there is a code model, else `"stage"`.
            codes (`torch.Tensor`, *optional*):
                Your own codes, as `.codes` of an output or `latent_embedder.encode` has them, `(images, rows * columns,
                bottleneck_dim)`; also one set for all images or one per label.
            code_num_inference_steps (`int`, defaults to 30): Steps of the code model.
            code_guidance_scale (`float`, *optional*):
                Class guidance of the code model, in every step; by default the pipeline's own.
            code_noise_level (`float`, *optional*):
                Noise on the codes that a stage sees, relative to their root mean square, in [0, 1]; 0.3 by default. Only
                for an embedder with `noise_level_input`, which reads the level. Returned codes are without this noise.

        Examples:
            ```py
            >>> import torch
            >>> from diffusers_dod import DoDPipeline

            >>> pipe = DoDPipeline.from_pretrained("examples/pretrained/digits")
            >>> images = pipe([3, 7], num_inference_steps=12, generator=torch.Generator().manual_seed(0)).images
            >>> images[0].save("three.png")
            ```

        Returns:
            [`DoDPipelineOutput`], or with `return_dict=False` the tuple `(images,)` or `(images, stages)`.

        Raises:
            ValueError: for arguments that do not fit the model, the scheduler or each other.
        """
        # 1. What to make, and whether it can be made
        check_loaded(self.components)
        label_ids = self.prepare_class_labels(class_labels)
        check_count("num_images_per_prompt", num_images_per_prompt)
        batch_size = len(label_ids) * num_images_per_prompt
        prior_source = self.choose_prior_source(prior_source, codes, image)
        if num_stages is None:
            num_stages = 1 if prior_source == "codes" else 2
        sample_size = self.transformer.config.sample_size
        sample_height, sample_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if torch.is_tensor(latents) and latents.ndim == 4:
            sample_height, sample_width = latents.shape[-2:]
        height = sample_height * self.spatial_factor if height is None else height
        width = sample_width * self.spatial_factor if width is None else width
        check_guidance(
            self.guider,
            self.transformer,
            self.weak_transformer,
            guidance_scale,
            prior_guidance_scale,
            guidance_drop,
            guidance_interval,
        )
        guidance_interval = DEFAULT_INTERVAL if guidance_interval is None else guidance_interval
        if code_guidance_scale is None:
            code_guidance_scale = self.config.code_guidance_scale
        check_switches(return_dict=return_dict, return_stages=return_stages)
        on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            batch_size,
            num_stages,
            num_inference_steps,
            guidance_scale,
            prior_guidance_scale,
            guidance_interval,
            generator,
            height,
            width,
            latents,
            image,
            output_type,
            *on_step_end,
            prior_source,
            codes,
            code_num_inference_steps,
            code_guidance_scale,
            code_noise_level,
        )
        if self.guider is not None:
            guidance_scale = 1.0  # of the pipeline's own
        elif guidance_scale is None:
            first = CODES_GUIDANCE if prior_source == "codes" else FIRST_GUIDANCE
            guidance_scale = [first] + [LATER_GUIDANCE] * (num_stages - 1)
        device, dtype = self._execution_device, self.transformer.dtype
        class_ids = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_prompt)
        latent_size = self._latent_shape(height, width)[1:]
        self._num_stages, self._num_timesteps, self._interrupt = num_stages, 0, False
        self._current_timestep, self._current_stage = None, 0

        # 2. What stands for the first stage's sample: codes, or a user's picture
        prior_latents, first_stage = None, 1
        if codes is not None:
            codes = self.prepare_codes(codes, batch_size, height, width, dtype, device)
        elif prior_source == "codes":
            codes = self.generate_codes(
                *(class_ids, height, width, code_num_inference_steps, code_guidance_scale, generator), *on_step_end
            )
        if image is not None:
            prior_latents = self.prepare_image_latents(
                image, batch_size, num_images_per_prompt, height, width, dtype, device
            )
            first_stage = 2

        # 3. Stages, each from fresh noise
        stage_latents = []
        for stage in range(first_stage, num_stages + 1):
            self._current_stage = stage
            # One scale for all stages is set once, so that what a callback makes of it lasts.
            if stage == first_stage or isinstance(guidance_scale, list):
                self._guidance_scale = per_stage(guidance_scale, num_stages)[stage - 1]
            if stage == first_stage or isinstance(prior_guidance_scale, list):
                self._prior_guidance_scale = per_stage(prior_guidance_scale, num_stages)[stage - 1]
            prior_tokens, code_noise = None, {}
            if prior_latents is not None or codes is not None:
                where = (batch_size, height, width, dtype, device)
                code_noise = self.prepare_code_noise(code_noise_level, *where, generator)
            if prior_latents is not None:
                prior_tokens, stage_codes = self.latent_embedder(prior_latents, return_dict=False, **code_noise)
                codes = stage_codes if codes is None else codes
            elif codes is not None:
                prior_tokens = self.latent_embedder.decode(codes, *latent_size, **code_noise)
            noise = self.prepare_latents(batch_size, height, width, dtype, device, generator, latents)
            prior_latents = self.denoise(
                self.scheduler,
                noise,
                class_ids,
                prior_tokens,
                per_stage(num_inference_steps, num_stages)[stage - 1],
                self.prepare_guidance(guidance_drop, per_stage(guidance_interval, num_stages)[stage - 1]),
                generator,
                *on_step_end,
            )
            stage_latents.append(prior_latents)
            latents = None
            if self._interrupt:
                break

        # 4. Images
        images = self.decode(stage_latents[-1], output_type)
        stages = None
        if return_stages:
            stages = [self.decode(sample, output_type) for sample in stage_latents[:-1]] + [images]
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, stages) if return_stages else (images,)
        return DoDPipelineOutput(images=images, stages=stages, codes=codes)
