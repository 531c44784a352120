"""Makes a repository of a model of the study: pipeline, figures, picture and card.

python study/keep_model.py digits --variant dod --seed 0 --target examples/pretrained/digits
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from experiments import ALL_STAGES, STAGE, STUDIES, VARIANTS
from PIL import Image
from run_study import Run

import diffusers_dod
from diffusers_dod import DoDPipeline
from diffusers_dod.hub.card import build_card
from diffusers_dod.viz import stage_grid


NAMES = {
    "fd": "Fréchet distance (64 features of the study's classifier)",
    "fd_pca": "Fréchet distance (64 principal components of pixels)",
    "accuracy": "accuracy of the study's classifier",
}


def evaluation(data: str, facts: dict, record: dict) -> dict:
    """The unguided figures of all stages, in the form of `diffusers-dod evaluate`."""
    rows = [row for row in record["rows"] if row["step"] == record["steps"][-1] and row["setting"] == str(ALL_STAGES)]
    results = [
        {"metric": metric, "name": name, "value": round(row[metric], 4), "stage": row["stage"]}
        for row in rows
        for metric, name in NAMES.items()
    ]
    return {
        "reference": f"the study's {data}, training images",
        "num_samples": facts["num_samples"],
        "num_reference": facts["images"],
        "extractor": "the study's classifier",
        "num_inference_steps": STAGE,
        "guidance_scale": 1.0,
        "scheduler": "DPMSolverMultistepScheduler",
        "seed": record["seed"],
        "versions": {"diffusers-dod": diffusers_dod.__version__, "torch": facts["torch"]},
        "results": results,
    }


def draw_stages(pipe: DoDPipeline, path: Path) -> None:
    """Ten classes (columns) in all stages (rows), with the pipeline's default guidance."""
    stages = pipe(
        list(range(10)),
        num_stages=3,
        num_inference_steps=STAGE,
        generator=torch.Generator().manual_seed(0),
        return_stages=True,
    ).stages
    stage_grid([[image.resize((84, 84), Image.Resampling.NEAREST) for image in stage] for stage in stages]).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--variant", choices=VARIANTS, default="dod")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--license", default="apache-2.0")
    args = parser.parse_args()

    folder, data = args.output_dir / args.study, STUDIES[args.study].data
    run = Run(folder, args.variant, args.seed)
    record, facts = run.record(), json.loads((folder / "data.json").read_text())
    pipe = DoDPipeline.from_pretrained(run.models / f"step-{record['steps'][-1]}")
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe, pipe.transformer, pipe.latent_embedder):
        part.register_to_config(_name_or_path=None)  # a path of this machine
    # Without the code that DoDPipeline.save_pretrained adds: here it would only repeat src/.
    DiffusionPipeline.save_pretrained(pipe, args.target)

    (args.target / "evaluation.json").write_text(
        json.dumps(evaluation(data, facts, record), indent=2, ensure_ascii=False)
    )
    training = {"data": data, "max_train_steps": record["steps"][-1], "seed": args.seed}
    training |= asdict(VARIANTS[args.variant]) | facts["size"]
    (args.target / "training_config.json").write_text(json.dumps(training, indent=2))
    draw_stages(pipe, args.target / "stages.png")
    card = build_card(args.target, str(args.target), args.license, has_picture=True, has_code=False)
    (args.target / "README.md").write_text(card)


if __name__ == "__main__":
    main()
