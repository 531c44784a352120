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

from .arguments import check_choice


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
