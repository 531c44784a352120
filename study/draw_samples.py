"""Pictures of what the study's models make, not chosen: the first samples of seed 0.

    python study/draw_samples.py glyphs --output_dir outputs/study     # writes study/results/glyphs-samples.png
    python study/draw_samples.py emoji --output_dir outputs/study --guidance 2

Rows from above: real images of the classes, the class-only model at equal steps, DoD's stage 1 and stage 2.
"""

import argparse
from pathlib import Path

import torch
from data_sets import DataSet
from diffusers.image_processor import VaeImageProcessor
from experiments import RESULTS, STAGE, STUDIES
from measure_model import Setting, sample, sample_labels
from run_study import Run, load_pipeline

from diffusers_dod.viz import stage_grid


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--guidance", type=float, default=1.0, help="of every stage and of the rival")
    parser.add_argument("--columns", type=int, default=20)
    args = parser.parse_args()

    folder = args.output_dir / args.study
    data = DataSet(**torch.load(folder / "data.pt", weights_only=True))
    labels = sample_labels(data, args.columns)
    rows = [torch.stack([data.held_out_images[data.held_out_labels == label][n] for n, label in enumerate(labels)])]
    for name, steps in (("class_only", (2 * STAGE,)), ("dod", (STAGE, STAGE))):
        run = Run(folder, name, seed=0)
        step = run.record()["steps"][-2 if name == "class_only" else -1]
        pipe = load_pipeline(run.models / f"step-{step}", "cpu")
        rows += sample(pipe, Setting(steps, (args.guidance,) * len(steps)), labels, data, seed=0)
    to_pictures = VaeImageProcessor().postprocess
    target = RESULTS / f"{args.study}-samples.png"
    stage_grid([to_pictures(row, output_type="pil") for row in rows], scale=2).save(target)
    print(target)


if __name__ == "__main__":
    main()
