"""Draws some samples of a pipeline and makes pictures of them.

    python -m diffusers_dod.viz --model outputs/mine --output_dir pictures

`output_dir` receives `stages.png` (rows: stages, columns: classes), `differences.png` (what each stage changed in the
sample of the one before; middle gray is no change) and `codes.png` (what the embedder reads off every sample); with
`--logs outputs/mine/logs` also `curves.png`, which needs tensorboard and matplotlib. The same arguments give the same
pictures.
"""

import argparse
import sys
from pathlib import Path

import torch

from ..pipeline_dod import DoDPipeline
from ..randomness import row_generators
from . import plot_curves, read_scalars, stage_code_maps, stage_differences, stage_grid


MAX_COLUMNS = 10


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_dod.viz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or repository of the Hub")
    add("--output_dir", type=Path, required=True)
    add("--classes", nargs="+", help=f"ids or names; default: the first {MAX_COLUMNS}")
    add("--num_stages", type=int, default=3)
    add("--num_inference_steps", type=int, default=30)
    add("--guidance_scale", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--logs", type=Path, help="the `logs` folder of the training run")
    return parser.parse_args(argv)


def choose_classes(pipe: DoDPipeline, names: list[str] | None) -> list[int | None]:
    """Class ids of ids or names; `None` for a model without classes."""
    num_classes = pipe.transformer.config.num_classes
    if names is None:
        first: list[int | None] = [*range(min(num_classes, MAX_COLUMNS))]
        return first or [None] * MAX_COLUMNS
    return [
        *pipe.prepare_class_labels(
            [name if name in pipe.labels or not name.isdigit() else int(name) for name in names]
        )
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    pipe = DoDPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")

    # 1. Samples; one generator each, so that a column does not depend on the others
    try:
        class_ids = choose_classes(pipe, args.classes)
        stages = pipe(
            class_ids,
            num_stages=args.num_stages,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=row_generators(args.seed, 0, range(len(class_ids))),
            output_type="latent",
            return_stages=True,
        ).stages
    except ValueError as error:
        print(f"diffusers_dod.viz: error: {error}", file=sys.stderr)
        return 2

    # 2. Pictures
    names = pipe.config.id2label or {}
    labels = ["no class" if i is None else names.get(str(i), f"class {i}") for i in class_ids]
    images = [pipe.decode(latents, "pil") for latents in stages]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stage_grid(images, labels).save(args.output_dir / "stages.png")
    stage_grid(stage_code_maps(pipe, stages), labels).save(args.output_dir / "codes.png")
    if len(images) > 1:
        stage_grid(stage_differences(images), labels, first_stage=2).save(args.output_dir / "differences.png")
    if args.logs is not None:
        plot_curves(read_scalars(args.logs), args.output_dir / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
