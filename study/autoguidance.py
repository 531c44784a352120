"""Autoguidance (Karras et al. 2024, arXiv 2406.02507): the weaker model of an earlier step guides, and keeps the class."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffusers_dod import DoDPipeline


@contextmanager
def guided_by(pipe: DoDPipeline, weak: DoDPipeline) -> Iterator[None]:
    """Within it class guidance of `pipe` goes away from the prediction of `weak`, in the place of the null class's.

    `weak` reads the class, and the prior through its own embedder.
    """
    tokens: list[torch.Tensor] = []  # of the weak embedder, for the stage before

    def embed(_, inputs: tuple) -> None:
        tokens[:] = [weak.latent_embedder(inputs[0]).prior_tokens]

    def replace_null_rows(model, inputs: tuple, options: dict, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        labels = options["class_labels"]
        half = len(labels) // 2
        if not (labels[half:] == model.config.num_classes).all():
            return output
        prediction = weak.transformer(
            inputs[0][:half],
            timestep=options["timestep"][:half],
            class_labels=labels[:half],
            encoder_hidden_states=tokens[0] if options["encoder_hidden_states"] is not None else None,
            return_dict=False,
        )[0]
        return (torch.cat([output[0][:half], prediction]),)

    hooks = [
        pipe.latent_embedder.register_forward_pre_hook(embed),
        pipe.transformer.register_forward_hook(replace_null_rows, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
