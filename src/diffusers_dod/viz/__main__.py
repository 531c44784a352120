"""Draws some samples of a pipeline and makes pictures of them.

    diffusers-dod viz --model outputs/mine --output_dir pictures

`output_dir` receives `stages.png` (rows: stages, columns: classes), `differences.png` (what each stage changed in the
previous stage's sample; middle gray is no change) and `codes.png` (the codes that the embedder extracts from every
sample); with `--logs outputs/mine/logs` also `curves.png`, which needs tensorboard and matplotlib. The same arguments
give the same pictures.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..cli import Parser, bad_input, number, run


MAX_COLUMNS = 10


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod viz", description=__doc__)
    add, positive = parser.add_argument, number(int, 1)
    add("--model", required=True, help="folder or Hub repository")
    add("--output_dir", type=Path, required=True, help="folder of the pictures")
    add("--classes", nargs="+", help=f"ids or names; default: the first {MAX_COLUMNS}")
    add(
        "--num_stages",
        type=number(int, 1, 1000),
        help="stages to run; default: one more than the pipeline's, so 3, or 2 from codes",
    )
    source = "where the first prior comes from; default: codes where there is a code model"
    add("--prior_source", choices=("codes", "stage"), help=source)
    add("--num_inference_steps", type=positive, default=30, help="denoising steps per stage")
    scale = "class guidance of every stage; refused with a guider, which has its own; default: 1, no guidance"
    add("--guidance_scale", type=number(float, float("-inf")), help=scale)
    add(
        "--code_guidance_scale",
        type=number(float, float("-inf")),
        default=1.0,
        help="class guidance of the code model; the default saved in the pipeline is not used",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the noise")
    add("--logs", type=Path, help="the `logs` folder of the training run; default: no curves")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def choose_classes(pipe: Any, names: list[str] | None) -> list[int | None]:
    """Class ids of ids or names; `None` for a model without classes."""
    num_classes = pipe.transformer.config.num_classes
    if names is None:
        first: list[int | None] = [*range(min(num_classes, MAX_COLUMNS))]
        return first or [None] * MAX_COLUMNS
    given = [name if name in pipe.labels or not name.isdigit() else int(name) for name in names]
    return [*pipe.prepare_class_labels(given)]


def draw(args: argparse.Namespace) -> None:
    import torch

    from ..pipeline_dod import DoDPipeline
    from ..randomness import row_generators
    from .codes import stage_code_maps
    from .curves import plot_curves, read_scalars
    from .grids import stage_differences, stage_grid

    # 1. Samples; one generator each, so that a column does not depend on the others
    with bad_input():
        pipe = DoDPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
        pipe.check_output_type("pil")
        class_ids = choose_classes(pipe, args.classes)
        source = args.prior_source or ("stage" if pipe.code_transformer is None else "codes")
        stages = pipe(
            class_ids,
            num_stages=args.num_stages or (3 if source == "stage" else 2),
            prior_source=source,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=1.0 if args.guidance_scale is None and pipe.guider is None else args.guidance_scale,
            code_guidance_scale=args.code_guidance_scale,
            generator=row_generators(args.seed, 0, range(len(class_ids))),
            output_type="latent",
            return_stages=True,
        ).stages

    # 2. Pictures
    names = pipe.config.id2label or {}
    labels = ["no class" if i is None else names.get(str(i), f"class {i}") for i in class_ids]
    images = [pipe.decode(latents, "pil") for latents in stages]
    pictures = {
        "stages.png": stage_grid(images, labels),
        "codes.png": stage_grid(stage_code_maps(pipe, stages), labels),
    }
    if len(images) > 1:
        pictures["differences.png"] = stage_grid(stage_differences(images), labels, first_stage=2)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(args.output_dir / name)
        print(args.output_dir / name)
    if args.logs is not None:
        with bad_input(ValueError, OSError, ImportError, what="--logs"):
            plot_curves(read_scalars(args.logs), args.output_dir / "curves.png")
        print(args.output_dir / "curves.png")


def main(argv: list[str] | None = None) -> int:
    return run(lambda arguments: draw(parse_args(arguments)), "diffusers-dod viz", argv)


if __name__ == "__main__":
    sys.exit(main())
