"""Linear probes of the latent embedder's codes (Table 2 of Yue et al. 2024, arXiv 2410.08531)."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..autoencoding import encode_images
from ..cli import BadInput, bad_input
from ..data.images import collate_images, load_labelled_images
from ..latent_embedder_dod import DoDLatentEmbedder
from ..pipeline_dod import DoDPipeline


WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@torch.no_grad()
def extract(
    folder: str, pipe: DoDPipeline, untrained: DoDLatentEmbedder, args: argparse.Namespace
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Features of all images by name, `(images, channels)` each, and their labels."""
    data, _ = load_labelled_images(folder)
    if args.max_images is not None:
        data = data.shuffle(seed=args.seed).select(range(min(args.max_images, len(data))))
    size = pipe.latent_embedder.config.sample_size * pipe.spatial_factor
    channels = pipe.transformer.config.in_channels if pipe.vae is None else 3
    loader = DataLoader(
        data,
        args.batch_size,
        num_workers=args.num_workers,
        collate_fn=partial(collate_images, size=size, channels=channels),
    )
    parts: dict[str, list[torch.Tensor]] = {"codes": [], "raw latents": [], "codes, untrained": []}
    labels = []
    for pixels, batch_labels in tqdm(loader, desc=Path(folder).name):
        latents = encode_images(pipe.vae, pixels.to(pipe.device).float() / 127.5 - 1)
        parts["codes"].append(pipe.latent_embedder(latents).codes.flatten(1).float().cpu())
        parts["raw latents"].append(latents.flatten(1).float().cpu())
        parts["codes, untrained"].append(untrained(latents).codes.flatten(1).float().cpu())
        labels.append(batch_labels)
    return {name: torch.cat(values) for name, values in parts.items()}, torch.cat(labels)


def fit(features: torch.Tensor, labels: torch.Tensor, num_classes: int, weight_decay: float) -> torch.nn.Linear:
    """Multinomial logistic regression, brought to its optimum by L-BFGS."""
    probe = torch.nn.Linear(features.shape[1], num_classes)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(features), labels) + weight_decay * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return probe


def accuracy(probe: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> float:
    return (probe(features).argmax(dim=1) == labels).float().mean().item()


def probe_accuracy(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor) -> float:
    """Top-1 accuracy on the test set, the weight decay chosen without it."""
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    num_classes, kept = int(max(labels.max(), test_labels.max())) + 1, len(train) * 4 // 5

    def validate(weight_decay: float) -> float:
        return accuracy(fit(train[:kept], labels[:kept], num_classes, weight_decay), train[kept:], labels[kept:])

    best = max(WEIGHT_DECAYS, key=validate)
    return accuracy(fit(train, labels, num_classes, best), test, test_labels)


def probe(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of all probes; `args` are those of `diffusers-dod probe`."""
    with bad_input():
        pipe = DoDPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    size = pipe.latent_embedder.config.sample_size
    if not isinstance(size, int):
        raise BadInput(f"the model is for latents of {size}, but images are square here")
    torch.manual_seed(args.seed)
    untrained = DoDLatentEmbedder.from_config(pipe.latent_embedder.config).to(pipe.device).eval()

    # 1. Features; the rows are shuffled, since a folder is sorted by class
    with bad_input():
        features, labels = extract(args.train_data_dir, pipe, untrained, args)
        test = extract(args.test_data_dir, pipe, untrained, args) if args.test_data_dir else None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
    features, labels = {name: values[order] for name, values in features.items()}, labels[order]
    if test is None:
        kept = len(labels) * 4 // 5
        test = {name: values[kept:] for name, values in features.items()}, labels[kept:]
        features, labels = {name: values[:kept] for name, values in features.items()}, labels[:kept]

    if len(labels) < 2 or not len(test[1]):
        raise BadInput(f"{len(labels)} images to train on and {len(test[1])} to test on are too few for a probe")

    # 2. Probes
    scores = {}
    for name, values in features.items():
        score = probe_accuracy(values, labels, test[0][name], test[1])
        scores[name] = {"value": score, "channels": values.shape[1]}
    return {
        "train_images": len(labels),
        "test_images": len(test[1]),
        "seed": args.seed,
        "top_1_accuracy": scores,
        "most_frequent_class": (test[1] == labels.mode().values).float().mean().item(),
    }
