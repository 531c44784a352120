"""Do these components and this scheduler fit each other? Functions of classes and configs alone."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin

from .arguments import shown
from .autoencoding import vae_latent_channels


# By which entry of its config a model is known; its class may be that of a repository's own code.
KNOWN_BY = {"transformer": "num_classes", "code_transformer": "num_classes", "latent_embedder": "bottleneck_dim"}


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


def scheduler_reads(scheduler: type, config: Mapping[str, Any]) -> str:
    """What a scheduler takes for the model's output: `"flow"`, `"epsilon"`, `"v_prediction"` or `"sample"`.

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
            "contradict each other: use a scheduler with `use_flow_sigmas=True, prediction_type='flow_prediction'` "
            "for a flow model and with neither for another."
        )
    return reads


def keeps_variance(scheduler: type, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler reads the second half of the output's channels as a learned variance."""
    return scheduler_entries(scheduler, config).get("variance_type") in ("learned", "learned_range")


def check_scheduler(scheduler: type, config: Mapping[str, Any], transformer: Any) -> None:
    """Compares a scheduler with the transformer's prediction.

    Args:
        scheduler (`type`), config (mapping): the scheduler's class and config.
        transformer: config of the [`DoDTransformer2DModel`].

    Raises:
        ValueError: with a scheduler that fits.
    """
    if scheduler_entries(scheduler, config).get("use_dynamic_shifting"):
        raise ValueError(
            f"{scheduler.__name__} has `use_dynamic_shifting=True`, for which it needs a `mu` that this pipeline does not "
            "give: make it with `use_dynamic_shifting=False` and a fixed `shift`."
        )
    name, reads, predicts = scheduler.__name__, scheduler_reads(scheduler, config), transformer.prediction_type
    if predicts not in (None, reads):
        fitting = (
            "FlowMatchEulerDiscreteScheduler" if predicts == "flow" else f"DDIMScheduler(prediction_type={predicts!r})"
        )
        raise ValueError(
            f"The transformer predicts {predicts!r} but {name} reads {reads!r}: use a scheduler made for {predicts!r}, "
            f"such as {fitting}."
        )
    if not keeps_variance(scheduler, config):
        return
    if not issubclass(scheduler, DDPMScheduler):
        raise ValueError(
            f"{name} cannot read a learned variance: make it with `variance_type=None`, or use DDPMScheduler."
        )
    if transformer.out_channels != 2 * transformer.in_channels:
        raise ValueError(
            f"{name} has `variance_type={config['variance_type']!r}` but the transformer predicts no variance (its "
            f"`out_channels` is not {2 * transformer.in_channels}): make the scheduler with `variance_type='fixed_small'`."
        )
