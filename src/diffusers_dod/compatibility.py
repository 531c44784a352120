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

from .arguments import shown
from .autoencoding import vae_latent_channels


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
