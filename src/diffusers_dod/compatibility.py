"""Do these components and this scheduler fit each other? Functions of classes and configs alone."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from packaging.version import Version

from .autoencoding import vae_latent_channels


# Of `from_pretrained`. diffusers 0.42 deprecates the older name, which is the only one before it.
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42.0.dev0") else "torch_dtype"


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
